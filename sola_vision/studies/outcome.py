# SPDX-License-Identifier: Apache-2.0
"""The outcome of a study in a folder: its plan, the finished runs, and a verdict on every claim.

NAME/results.json contains both the plan and the finished runs, so that a page can be written from that file alone.
Newer results in FOLDER/results are added to it first.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sola_vision.engine import write_json

from .catalogue import STUDIES, custom
from .definition import Claim, Study
from .runner import stored
from .statistics import Comparison, compare, standard_error

RESULTS = "results.json"


@dataclass(frozen=True)
class Row:
    """One arm of the table; runs without a finite metric are not in by_seed."""

    name: str
    schedule: str
    bridges: str
    paper: float | None
    paper_gmacs: float | None
    paper_params: float | None
    by_seed: dict[int, float]
    parameters: int
    macs: int
    images_per_second: float | None

    @property
    def mean(self) -> float | None:
        """The mean over seeds, None without results."""
        values = list(self.by_seed.values())
        return sum(values) / len(values) if values else None

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return standard_error(list(self.by_seed.values()))

    @property
    def text(self) -> str:
        """Mean, standard error and number of seeds; without an error for one seed, empty without results."""
        if self.mean is None:
            return ""
        n = len(self.by_seed)
        return f"{self.mean:.2f} ± {self.error:.2f} ({n})" if n > 1 else f"{self.mean:.2f} (1)"


@dataclass(frozen=True)
class Judged:
    """A claim, the paper's difference and the measured one; `ours` is None if no seed has results of all arms."""

    claim: Claim
    paper: float | None
    ours: Comparison | None


@dataclass(frozen=True)
class Outcome:
    """The content of a page."""

    study: Study
    plan: dict[str, Any]
    results: list[dict[str, Any]]
    rows: list[Row]
    judged: list[Judged]

    @property
    def missing(self) -> int:
        """The number of runs that are not finished."""
        return len(self.plan["keys"]) - len(self.results)

    @property
    def without_number(self) -> int:
        """The number of finished runs without a finite metric: they diverged, or no held-out pixel counts."""
        return len(self.results) - sum(len(row.by_seed) for row in self.rows)


def write_plan(folder: Path, description: dict[str, Any]) -> None:
    """Write the plan of a study to its results.json; more seeds extend an existing one.

    Raise ValueError if the folder contains this study with other settings.
    """
    path = folder / description["name"] / RESULTS
    results = []
    if path.exists():
        before = json.loads(path.read_text())
        for name in ("scale", "data", "epochs", "batch_size", "lr", "size", "arms"):
            if _comparable(description[name]) != _comparable(before["plan"][name]):
                raise ValueError(
                    f"{path.parent} contains {description['name']} with another {name}: repeat the same options or "
                    "choose another --out"
                )
        results = before["results"]
        if before["plan"]["seeds"] > description["seeds"]:
            description = before["plan"]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"plan": description, "results": results})


def _comparable(value: Any) -> Any:
    # the fingerprint identifies a copied or renamed folder of images
    return {k: v for k, v in value.items() if k != "name"} if isinstance(value, dict) else value


def gather(folder: Path, name: str) -> Outcome:
    """Return the outcome of a study in `folder`, and add new results to its results.json.

    Raise FileNotFoundError if the study was not run in this folder.
    """
    path = folder / name / RESULTS
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; run the study into this folder first (sola study {name})")
    content = json.loads(path.read_text())
    plan = content["plan"]
    known = {result["key"]: result for result in content["results"]}
    known |= {result["key"]: result for result in stored(folder, list(plan["keys"]))}
    results = [{"arm": plan["keys"][key][0], **known[key]} for key in plan["keys"] if key in known]
    if results != content["results"]:
        write_json(path, {"plan": plan, "results": results})
    study = STUDIES[name] if name in STUDIES else _custom(plan)
    rows = [_row(study, arm, plan, results) for arm in plan["arms"]]
    by_arm = {row.name: row.by_seed for row in rows}
    judged = [
        Judged(claim, study.paper_difference(claim), _judge(claim, by_arm))
        for claim in study.claims
        if by_arm.keys() >= {*claim.better, *claim.worse}
    ]
    return Outcome(study, plan, results, rows, judged)


def _custom(plan: dict[str, Any]) -> Study:
    return custom([f"{arm['schedule']} {arm['bridges']}" for arm in plan["arms"].values()])


def _row(study: Study, name: str, plan: dict[str, Any], results: Sequence[dict[str, Any]]) -> Row:
    finished = [result for result in results if result["arm"] == name]
    arm, planned = study.arm(name), plan["arms"][name]
    speeds = [result["images_per_second"] for result in finished if result["images_per_second"]]
    return Row(
        name=name,
        schedule=arm.schedule,
        bridges=arm.bridges,
        paper=arm.paper,
        paper_gmacs=arm.paper_gmacs,
        paper_params=arm.paper_params,
        by_seed={result["seed"]: result[study.metric] for result in finished if _measured(result[study.metric])},
        parameters=planned["parameters"],
        macs=planned["macs"],
        images_per_second=statistics.median(speeds) if speeds else None,
    )


def _measured(value: float | None) -> bool:
    return value is not None and math.isfinite(value)  # earlier versions stored nan


def _judge(claim: Claim, by_arm: dict[str, dict[int, float]]) -> Comparison | None:
    """Compare the arms of a claim over the seeds for which all of them have results."""
    values = [by_arm[name] for name in (*claim.better, *claim.worse)]
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in values)))
    if not seeds:
        return None

    def mean(names: Sequence[str], seed: int) -> float:
        return sum(by_arm[name][seed] for name in names) / len(names)

    return compare([mean(claim.better, seed) - mean(claim.worse, seed) for seed in seeds])
