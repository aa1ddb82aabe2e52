# SPDX-License-Identifier: Apache-2.0
"""The MLP of a softmax layer in inference on a CPU: bias, depth-wise convolution and GELU as one pass of the kernel's
beside torch's three.

    python benchmarks/depthwise.py             # writes benchmarks/results/depthwise.json; one quiet minute

`sola_vision/layers/bands.py` says where the kernel is taken.
"""

import argparse
from pathlib import Path

import torch
from measures import RESULTS
from torch import Tensor

from sola_vision.bench.rounds import Protocol, interleave, ratio
from sola_vision.engine.log import surroundings, write_json
from sola_vision.engine.memory import keep_heap
from sola_vision.layers import bands, softmax
from sola_vision.ops import cpu

# images, height and width, channels: stages 3 and 4 of small and tiny with 8 images and with one, and at 1024 pixels
SHAPES = ((8, 14, 384), (8, 7, 768), (8, 14, 192), (1, 14, 384), (1, 7, 768), (1, 64, 384), (1, 32, 768), (1, 64, 192))
DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "depthwise.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_heap()
    rows = [measure(shape, dtype, Protocol(rounds=options.rounds, seconds=0.3)) for dtype in DTYPES for shape in SHAPES]
    head = {"threads": options.threads, "instruction_set": cpu.instruction_set()}
    write_json(options.out, {**surroundings(torch.device("cpu"), 1), **head, "rows": rows})


def measure(shape: tuple[int, int, int], dtype: torch.dtype, protocol: Protocol) -> dict[str, object]:
    torch.manual_seed(0)
    images, side, channels = shape
    layer = softmax.ConvMlp(channels).to(dtype).eval()
    x = torch.randn(images, side, side, channels, dtype=dtype)

    def run(one_pass: bool) -> Tensor:
        softmax.in_one_pass = bands.in_one_pass if one_pass else lambda *_: False
        with torch.inference_mode():
            out: Tensor = layer(x)
        return out

    try:
        times = interleave({"one pass": lambda: run(True), "torch": lambda: run(False)}, protocol)
    finally:
        softmax.in_one_pass = bands.in_one_pass
    faster, spread = ratio(times["torch"], times["one pass"])
    print(f"{shape} {dtype}: one pass {faster:.2f} times as fast", flush=True)
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": {name: found.median * 1e3 for name, found in times.items()},
        "torch_over_one_pass": {"ratio": faster, "spread": spread},
    }


if __name__ == "__main__":
    main()
