# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of whole networks, in inference and in training steps, compared with timm's.

All networks of a run are measured in the same interleaved rounds; between calls only their weights stay in memory.
Memory is measured in a separate process for each case: `python -m sola_vision.bench.network CASE THREADS` with the
case as JSON. Networks for a fixed image size are built for the requested one. A run or checkpoint is measured with
random weights.
"""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from timm.layers import DropPath
from torch import nn

from sola_vision import sola  # noqa: F401 - registers sola_* where this module is run on its own
from sola_vision.analysis import memory
from sola_vision.analysis.cost import build, count
from sola_vision.analysis.process import in_process
from sola_vision.bench.rounds import Job, Protocol, Times, interleave, ratio
from sola_vision.tasks import describe_classifier

# autocast: float32 weights, matrix products in bfloat16, as in training; bfloat16: the weights too, as in deployment
DTYPES = ("float32", "bfloat16", "autocast")
LAYOUTS = ("contiguous", "channels_last")
CLASSES = 1000


@dataclass(frozen=True)
class Case:
    """One network in one condition.

    model: a name of timm's registry, or the path of a classifier's run or checkpoint.
    """

    model: str
    height: int
    width: int
    batch: int
    dtype: str = "float32"
    layout: str = "contiguous"
    training: bool = False
    compiled: bool = False


def plan(
    models: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    *,
    batch: int = 1,
    dtypes: Sequence[str] = ("float32",),
    layouts: Sequence[str] = ("contiguous",),
    training: bool = False,
    compiled: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> dict[Case, float]:
    """Return the cases with the GMACs of one image.

    A network that does not take a size is reported and skipped there. Raises ValueError if no case remains.
    """
    cases: dict[Case, float] = {}
    for size in sizes:
        for model in dict.fromkeys(models):
            try:
                gmacs = count(_build(model, size), size, name=model).gmacs
            except (ValueError, AssertionError, RuntimeError) as error:
                report(f"skipped: {str(error).splitlines()[0]}")
                continue
            for dtype in dtypes:
                for layout in layouts:
                    for is_compiled in (False, True) if compiled else (False,):
                        cases[Case(model, *size, batch, dtype, layout, training, is_compiled)] = gmacs
    if not cases:
        raise ValueError("none of these networks takes any of these sizes: use other sizes, such as 224")
    return cases


def measure(
    cases: dict[Case, float],
    baselines: Sequence[str],
    protocol: Protocol,
    *,
    with_memory: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Return a row for every case, and the ratios of every other network to each of the `baselines`."""
    rows = {case: asdict(case) | {"gmacs": gmacs} for case, gmacs in cases.items()}
    for case, row in rows.items():
        if with_memory and not case.compiled:
            report(f"memory of {text(case)}")
            row |= memory_of(case)
    networks: dict[Any, nn.Module] = {}
    jobs: dict[Case, Job] = {}
    for case in cases:
        # sola_* networks take any size; compiled ones are compiled for one size
        fixed = case.compiled or not case.model.startswith("sola_") or Path(case.model).exists()
        key = (case.model, case.dtype, case.layout, case.compiled, (case.height, case.width) if fixed else None)
        if key not in networks:
            report(f"building {text(case)}")
            networks[key] = network(case)
        jobs[case] = job(networks[key], case)
        if case.compiled:
            jobs[case]()
    times = interleave(jobs, protocol, report=lambda number: report(f"round {number} of {protocol.rounds}"))
    for case, taken in times.items():
        per_second = case.batch / taken.median
        rows[case] |= {
            "seconds": taken.median,
            "spread": taken.spread,
            "images_per_second": per_second,
            "gmacs_per_second": per_second * cases[case],
            "rounds": list(taken.rounds),
        }
    return {"rows": list(rows.values()), "ratios": compare(times, cases, baselines)}


def compare(times: dict[Case, Times], gmacs: dict[Case, float], baselines: Sequence[str]) -> list[dict[str, Any]]:
    """Return the images (and multiply-adds) per second relative to each baseline, within one condition.

    "layout" is that of both networks, or "fastest": each in its fastest layout, where several were measured.
    """
    conditions: dict[tuple[Any, ...], dict[str, list[Case]]] = {}
    for case in times:
        alike = (case.height, case.width, case.batch, case.dtype, case.training, case.compiled)
        conditions.setdefault(alike, {}).setdefault(case.model, []).append(case)
    ratios = []
    for networks in conditions.values():
        for model, baseline in product(networks, baselines):
            if model in baselines or baseline not in networks:
                continue
            own, others = ({case.layout: case for case in networks[name]} for name in (model, baseline))
            if len(own) > 1:
                for layouts in (own, others):
                    layouts["fastest"] = min(layouts.values(), key=lambda case: times[case].median)
            for layout, case in own.items():
                other = others[layout]
                value, spread = ratio(times[other], times[case])
                ratios.append(
                    asdict(case)
                    | {"layout": layout, "baseline": baseline, "images_per_second": value, "spread": spread}
                    | {"gmacs_per_second": value * gmacs[case] / gmacs[other]}
                )
    return ratios


def text(case: Case) -> str:
    """Describe a case in one line."""
    return f"{case.model} at {case.height}x{case.width}, {condition(asdict(case))}"


def condition(row: dict[str, Any]) -> str:
    """Describe the condition of a case, a row or a ratio, such as "autocast training compiled"."""
    words = [row["dtype"], "training" * row["training"], "compiled" * row["compiled"]]
    words.append(row.get("layout", "").replace("contiguous", ""))
    return " ".join(word for word in words if word)


def network(case: Case) -> nn.Module:
    """Build the network of a case, without DropPath."""
    torch.manual_seed(0)
    model = _build(case.model, (case.height, case.width), device="cpu")
    for module in model.modules():
        if isinstance(module, DropPath):  # it is random, and its rates differ between families
            module.drop_prob = 0.0
    if case.dtype == "bfloat16":
        model = model.to(torch.bfloat16)
    if case.layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    model.train(case.training)
    if case.compiled:
        model.compile(dynamic=False)
    return model


def _build(model: str, size: tuple[int, int], device: str = "meta") -> nn.Module:
    if not Path(model).exists():
        return build(model, size, CLASSES, device=device)
    described = describe_classifier(model)
    return build(described.name, size, described.num_classes, device=device, **described.arguments)


def job(model: nn.Module, case: Case) -> Job:
    """Return a function that runs one forward, or one training step: forward, backward, fused AdamW."""
    images = torch.randn(case.batch, 3, case.height, case.width)
    if case.layout == "channels_last":
        images = images.to(memory_format=torch.channels_last)
    if case.dtype == "bfloat16":
        images = images.to(torch.bfloat16)

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16) if case.dtype == "autocast" else nullcontext():
            return model(images)

    if not case.training:
        return torch.inference_mode()(forward)
    labels = torch.zeros(case.batch, dtype=torch.long)  # the first class, which every head has
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        nn.functional.cross_entropy(forward().float(), labels).backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def memory_of(case: Case) -> dict[str, float | None]:
    """Measure a fresh process in MiB: its peak, and its increase by the network, images and optimiser state."""
    arguments = json.dumps(asdict(case)), str(torch.get_num_threads())
    found = in_process("sola_vision.bench.network", *arguments, subject=f"memory of {text(case)}")
    return found or {"peak_mib": None, "added_mib": None}


def _memory_here(case: Case, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    idle = memory.start()
    run = job(network(case), case)
    for _ in range(2):  # the optimiser allocates its state in the first step
        run()
    peak = memory.peak()
    return {"peak_mib": peak / 2**20, "added_mib": (peak - idle) / 2**20}


if __name__ == "__main__":
    print(json.dumps(_memory_here(Case(**json.loads(sys.argv[1])), int(sys.argv[2]))))
