# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of whole networks, in inference and in training steps, beside timm's.

All networks of a run are measured in the same interleaved rounds; between calls only their weights stay in memory.
Memory is measured in a process of its own for each figure: `python -m sola_vision.bench.network CASE THREADS` with the
case as JSON prints it. Networks that are laid out for one image size are built for the size that is asked.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any

import torch
from timm.layers import DropPath
from torch import nn

from sola_vision import sola  # noqa: F401 - registers sola_* where this module is run on its own
from sola_vision.analysis import memory
from sola_vision.analysis.cost import build, count
from sola_vision.bench.rounds import Job, Protocol, Times, interleave, ratio

# autocast: float32 weights, matrix products in bfloat16, as one trains; bfloat16: the weights too, as one deploys
DTYPES = ("float32", "bfloat16", "autocast")
LAYOUTS = ("contiguous", "channels_last")
CLASSES = 1000


@dataclass(frozen=True)
class Case:
    """One network in one condition."""

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
    left_out: Callable[[str], None] = lambda line: None,
) -> dict[Case, float]:
    """Cases with the GMACs of an image. A network that does not take a size is left out there, with a line that says
    so; ValueError if nothing remains.
    """
    cases: dict[Case, float] = {}
    for size in sizes:
        for model in dict.fromkeys(models):
            try:
                gmacs = count(build(model, size, CLASSES), size, name=model).gmacs
            except (ValueError, AssertionError, RuntimeError) as error:
                left_out(f"left out: {str(error).splitlines()[0]}")
                continue
            for dtype in dtypes:
                for layout in layouts:
                    for is_compiled in (False, True) if compiled else (False,):
                        cases[Case(model, *size, batch, dtype, layout, training, is_compiled)] = gmacs
    if not cases:
        raise ValueError("none of these networks takes any of these sizes: choose other sizes, such as 224")
    return cases


def measure(
    cases: dict[Case, float],
    baselines: Sequence[str],
    protocol: Protocol,
    *,
    with_memory: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """A row for every case, and the ratios of every other network over each of the `baselines`."""
    rows = {case: asdict(case) | {"gmacs": gmacs} for case, gmacs in cases.items()}
    for case, row in rows.items():
        if with_memory and not case.compiled:
            report(f"memory of {text(case)}")
            row |= memory_of(case)
    networks: dict[Any, nn.Module] = {}
    jobs: dict[Case, Job] = {}
    for case in cases:
        # ours have no layout for a size; compiled ones are compiled for a size
        fixed = case.compiled or not case.model.startswith("sola_")
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
    """How many times the images (and the multiply-adds) a second of each baseline, within one condition.

    "layout" is that of both sides, or "fastest": each side in the one that suits it best, where several were measured.
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
            mine, theirs = ({case.layout: case for case in networks[name]} for name in (model, baseline))
            if len(mine) > 1:
                for layouts in (mine, theirs):
                    layouts["fastest"] = min(layouts.values(), key=lambda case: times[case].median)
            for layout, case in mine.items():
                other = theirs[layout]
                value, spread = ratio(times[other], times[case])
                ratios.append(
                    asdict(case)
                    | {"layout": layout, "baseline": baseline, "images_per_second": value, "spread": spread}
                    | {"gmacs_per_second": value * gmacs[case] / gmacs[other]}
                )
    return ratios


def text(case: Case) -> str:
    return f"{case.model} at {case.height}x{case.width}, {condition(asdict(case))}"


def condition(row: dict[str, Any]) -> str:
    """ "float32", "autocast training compiled", ... of a case, a row or a ratio."""
    words = [row["dtype"], "training" * row["training"], "compiled" * row["compiled"]]
    words.append(row.get("layout", "").replace("contiguous", ""))
    return " ".join(word for word in words if word)


def network(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = build(case.model, (case.height, case.width), CLASSES, device="cpu")
    for module in model.modules():
        if isinstance(module, DropPath):  # it works at random, and the families' rates differ
            module.drop_prob = 0.0
    if case.dtype == "bfloat16":
        model = model.to(torch.bfloat16)
    if case.layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    model.train(case.training)
    if case.compiled:
        model.compile(dynamic=False)
    return model


def job(model: nn.Module, case: Case) -> Job:
    """One forward, or one training step: forward, backward, fused AdamW."""
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
    labels = torch.randint(CLASSES, (case.batch,))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        nn.functional.cross_entropy(forward().float(), labels).backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def memory_of(case: Case) -> dict[str, float | None]:
    """Mebibytes in a fresh process: all of it at its peak, and what network, images and states added to it."""
    command = [
        sys.executable,
        "-m",
        "sola_vision.bench.network",
        json.dumps(asdict(case)),
        str(torch.get_num_threads()),
    ]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode:  # killed for want of memory, as a rule
        last = (finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"])[-1]
        print(f"sola: memory of {text(case)} is not measured: {last}", file=sys.stderr)
        return {"peak_mib": None, "added_mib": None}
    return json.loads(finished.stdout)


def _memory_here(case: Case, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    idle = memory.start()
    run = job(network(case), case)
    for _ in range(2):  # the optimiser has its states from the first step on
        run()
    peak = memory.peak()
    return {"peak_mib": peak / 2**20, "added_mib": (peak - idle) / 2**20}


if __name__ == "__main__":
    print(json.dumps(_memory_here(Case(**json.loads(sys.argv[1])), int(sys.argv[2]))))
