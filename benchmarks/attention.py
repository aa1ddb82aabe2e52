# SPDX-License-Identifier: Apache-2.0
"""Softmax attention on a CPU, forward and backward: torch's own against the kernel of `csrc/attention.cpp`.

    python benchmarks/attention.py             # writes benchmarks/results/attention.json; a minute on an idle machine

`sola_vision/ops/multihead.py` chooses between the two.
"""

import argparse
from functools import partial

import torch
from measures import add_out
from torch import Tensor

from sola_vision.bench.rounds import Protocol, interleave, ratio
from sola_vision.engine.log import surroundings, write_json
from sola_vision.ops import cpu, softmax

HEAD_DIM = 32
# images, tokens, heads: stages 3 and 4 of sola_small at 224 and 1024 pixels (stage 3 also at 256), stage 3 of sola_tiny
# in training
SHAPES = ((8, 196, 12), (8, 256, 12), (8, 49, 24), (1, 4096, 12), (1, 1024, 24), (32, 196, 6))
DTYPES = (torch.float32, torch.bfloat16)


def kernel(qkv: Tensor) -> Tensor:
    return torch.ops.sola.attention(qkv, HEAD_DIM)[0]


def torch_attention(qkv: Tensor) -> Tensor:
    return softmax.attention(qkv, HEAD_DIM)


SIDES = {"torch": torch_attention, "kernel": kernel}


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    add_out(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [
        row
        for dtype in DTYPES
        for shape in SHAPES
        for row in measure(shape, dtype, Protocol(rounds=options.rounds, seconds=0.3))
    ]
    head = {"threads": options.threads, "instruction_set": cpu.instruction_set(), "head_dim": HEAD_DIM}
    write_json(options.out / "attention.json", {**surroundings(torch.device("cpu"), 1), **head, "rows": rows})


def measure(shape: tuple[int, int, int], dtype: torch.dtype, protocol: Protocol) -> list[dict[str, object]]:
    torch.manual_seed(0)
    images, tokens, heads = shape
    qkv = torch.randn(images, tokens, 3 * heads * HEAD_DIM, dtype=dtype, requires_grad=True)
    graphs = {side: function(qkv) for side, function in SIDES.items()}
    grad = torch.randn_like(graphs["torch"])
    jobs = {("forward", side): partial(forward, function, qkv) for side, function in SIDES.items()}
    jobs |= {("backward", side): partial(backward, out, qkv, grad) for side, out in graphs.items()}
    times = interleave(jobs, protocol)
    macs = 2 * images * heads * tokens * tokens * HEAD_DIM
    rows = []
    # five products in the backward where the forward has two
    for what, all_macs in (("forward", macs), ("backward", macs * 5 / 2)):
        torchs, ours = (times[what, side] for side in SIDES)
        faster, spread = ratio(torchs, ours)
        rates = [all_macs / found.median / 1e9 for found in (torchs, ours)]
        rows.append(
            {
                "shape": shape,
                "dtype": str(dtype).removeprefix("torch."),
                "what": what,
                "gmacs_per_second": dict(zip(SIDES, rates, strict=True)),
                "torch_over_kernel": {"ratio": faster, "spread": spread},
            }
        )
        print(f"{shape} {dtype} {what}: {rates[0]:.0f} and {rates[1]:.0f} GMACs/s", flush=True)
    return rows


def forward(function: object, qkv: Tensor) -> None:
    assert callable(function)
    with torch.no_grad():
        function(qkv)


def backward(out: Tensor, qkv: Tensor, grad: Tensor) -> None:
    torch.autograd.grad(out, qkv, grad, retain_graph=True)


if __name__ == "__main__":
    run()
