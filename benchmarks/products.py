# SPDX-License-Identifier: Apache-2.0
"""Products of tokens by weights and their gradients in float32: torch's matrix product against the 1x1 convolution.

    python benchmarks/products.py              # writes benchmarks/results/products.json; a minute on an idle machine

`sola_vision/layers/products.py` chooses between the two; run this on a processor that is not covered there.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from measures import add_out

from sola_vision.bench.rounds import Protocol, interleave, ratio
from sola_vision.engine.log import surroundings, write_json
from sola_vision.layers import products

WAYS = ("matrices", "convolution")
# rows, inner, outer: what the stages of sola_tiny and sola_small multiply for an image of 224 or a few
SHAPES = (
    (128, 768, 768),
    (392, 768, 768),
    (3136, 96, 96),
    (6272, 96, 384),
    (6272, 384, 96),
    (6272, 192, 768),
    (1568, 384, 1536),
    (1568, 1536, 384),
)


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    add_out(parser)
    options = parser.parse_args()
    chosen = products._convolution_is_faster()
    rows = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for shape in SHAPES:
            rows += measure(threads, shape, Protocol(rounds=options.rounds, seconds=0.3))
    write_json(
        options.out / "products.json",
        {**surroundings(torch.device("cpu"), 1), "convolution_is_chosen": chosen, "rows": rows},
    )


def measure(threads: int, shape: tuple[int, int, int], protocol: Protocol) -> list[dict[str, object]]:
    torch.manual_seed(0)
    number, inner, outer = shape
    x, weight, grad = torch.randn(number, inner), torch.randn(outer, inner), torch.randn(number, outer)
    out, grad_x = torch.empty(number, outer), torch.empty(number, inner)
    what: dict[str, Callable[[], object]] = {
        "product": partial(products.product_into, out, x, weight),
        "gradient of the rows": partial(products.product_into, grad_x, grad, weight.t()),
        "gradient of the weight": partial(products.weight_gradient, grad, x),
    }
    jobs = {(name, way): partial(by_way, way == "convolution", job) for name, job in what.items() for way in WAYS}
    with torch.no_grad():
        times = interleave(jobs, protocol)
    rows = []
    for name in what:
        matrices, convolution = (times[name, way] for way in WAYS)
        faster, spread = ratio(matrices, convolution)
        rates = [number * inner * outer / found.median / 1e9 for found in (matrices, convolution)]
        rows.append(
            {
                "threads": threads,
                "shape": shape,
                "what": name,
                "gmacs_per_second": dict(zip(WAYS, rates, strict=True)),
                "convolution_over_matrices": {"ratio": faster, "spread": spread},
            }
        )
        print(f"{threads} threads, {shape} {name}: {rates[0]:.0f} and {rates[1]:.0f} GMACs/s", flush=True)
    return rows


def by_way(convolution: bool, job: Callable[[], object]) -> None:
    products._convolution_is_faster = lambda: convolution
    job()


if __name__ == "__main__":
    run()
