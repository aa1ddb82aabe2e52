# SPDX-License-Identifier: Apache-2.0
"""A linear layer in inference on a CPU: products in tiles by the kernel against torch's products in bands.

    python benchmarks/tiles.py             # writes benchmarks/results/tiles.json; two minutes on an idle machine

`sola_vision/layers/dispatch.py` chooses between the two by the numbers of tokens and channels. `--instruction-set avx2`
limits the kernel to AVX2; MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 do so for
torch's libraries.
"""

import argparse

import torch
from measures import add_out
from torch import Tensor

from sola_vision.bench.rounds import Protocol, interleave, ratio
from sola_vision.engine.log import surroundings, write_json
from sola_vision.engine.memory import keep_heap
from sola_vision.layers import LinearLayer, dispatch
from sola_vision.ops import cpu

# images, height and width, channels: stages of tiny, small and base with 8 images and with one
SHAPES = (
    (8, 56, 96),
    (8, 28, 128),
    (8, 28, 192),
    (8, 14, 192),
    (8, 14, 384),
    (8, 14, 768),
    (1, 32, 768),
    (8, 7, 768),
    (8, 7, 512),
    (8, 7, 384),
    (8, 7, 256),
    (1, 56, 96),
    (1, 14, 192),
    (1, 14, 256),
    (1, 28, 384),
    (1, 14, 384),
    (1, 14, 768),
    (1, 7, 192),
    (1, 7, 256),
)
DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--instruction-set", help="of the kernel (default: the best supported)")
    add_out(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_heap()
    used = cpu.instruction_set(options.instruction_set)
    dtypes = [dtype for dtype in DTYPES if cpu.multiplies(dtype)]
    rows = [measure(shape, dtype, Protocol(rounds=options.rounds, seconds=0.3)) for dtype in dtypes for shape in SHAPES]
    name = f"tiles_{used}.json" if options.instruction_set else "tiles.json"
    head = {"threads": options.threads, "instruction_set": used}
    write_json(options.out / name, {**surroundings(torch.device("cpu"), 1), **head, "rows": rows})


def measure(shape: tuple[int, int, int], dtype: torch.dtype, protocol: Protocol) -> dict[str, object]:
    torch.manual_seed(0)
    images, side, channels = shape
    layer = LinearLayer(channels).to(dtype).eval()
    x = torch.randn(images, side, side, channels, dtype=dtype)
    chosen = bool(dispatch.multiplied_in_tiles(x))

    def run(fewest: float) -> Tensor:
        dispatch._tokens_per_square = lambda dtype: fewest
        with torch.inference_mode():
            out: Tensor = layer(x)[0]
        return out

    before = dispatch._tokens_per_square
    try:
        times = interleave({"tiles": lambda: run(0.0), "bands": lambda: run(float("inf"))}, protocol)
    finally:
        dispatch._tokens_per_square = before
    faster, spread = ratio(times["bands"], times["tiles"])
    milliseconds = {name: found.median * 1e3 for name, found in times.items()}
    per_token = channels**2 / (images * side * side)
    print(f"{shape} {dtype}: {per_token:.0f} squared channels a token, tiles {faster:.2f} times as fast", flush=True)
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "squared_channels_per_token": per_token,
        "tiles_are_chosen": chosen,
        "milliseconds": milliseconds,
        "bands_over_tiles": {"ratio": faster, "spread": spread},
    }


if __name__ == "__main__":
    main()
