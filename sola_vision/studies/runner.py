# SPDX-License-Identifier: Apache-2.0
"""Execution of a study in a folder: finished runs are kept, interrupted ones resumed, runs of other processes skipped.

    FOLDER/runs/KEY/          the folder of a run in training, and its claims
    FOLDER/results/KEY.json   a finished run, written atomically
    FOLDER/NAME/              the study's page, with its plan and results in results.json

KEY is a hash of everything that determines a run, so that studies share runs (Fig. 5 has two stacks of Table 1).
"""

import json
import shlex
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from sola_vision.engine import distributed, fit, write_json
from sola_vision.engine.distributed import on_main
from sola_vision.engine.log import read_records

from .claims import claimed
from .planning import Plan
from .runs import Run

Log = Callable[[str], None]

_METRICS = ("top1", "top5", "loss", "miou", "miou_all", "mean_accuracy", "pixel_accuracy")


def run_plan(plan: Plan, folder: Path, log: Log) -> int:
    """Execute all runs that are left, and return the number of those that other processes had claimed and not finished.

    Under torchrun every process must call it.
    """
    with distributed(plan.runs[0].train.device) as world:
        for number, run in enumerate(plan.runs):
            with _claimed_run(run, folder) as state:
                if state == "free":
                    if world.is_main:
                        log(f"{plan.study.name} {number + 1} of {len(plan.runs)}: {run.arm}, seed {run.seed}")
                    result = _train(run, plan.images, folder)
                    on_main(lambda run=run, result=result: _store(run, result, folder))  # type: ignore[misc]  # of defaults
    return sum(not result_file(folder, key).exists() for key in {run.key for run in plan.runs})


def result_file(folder: Path, key: str) -> Path:
    """Return the file of a finished run."""
    return folder / "results" / f"{key}.json"


@contextmanager
def _claimed_run(run: Run, folder: Path) -> Iterator[str]:
    """Claim a run on the first process and yield its state on all: "finished", "busy" (claimed elsewhere) or "free"."""
    result = result_file(folder, run.key)
    with ExitStack() as stack:

        def claim() -> str:
            if result.exists():
                return "finished"
            free = stack.enter_context(claimed(folder / "runs" / run.key))
            # it may have been finished since the check above
            return "finished" if result.exists() else "free" if free else "busy"

        yield on_main(claim)


def _train(run: Run, images: Any, folder: Path) -> dict[str, Any]:
    out = folder / "runs" / run.key
    job = run.prepare(images)
    begun = (out / "metrics.jsonl").exists()
    return fit(
        job.task,
        job.model,
        images.train,
        images.val,
        run.train,
        out,
        resume=begun,
        metadata=job.metadata,
        eval_collate=job.eval_collate,
    )


def _store(run: Run, summary: dict[str, Any], folder: Path) -> None:
    out = folder / "runs" / run.key
    speeds = [
        record["images_per_second"]
        for record in read_records(out / "metrics.jsonl")
        if record["kind"] == "train" and record.get("images_per_second")
    ]
    kept = ("hardware", "processes", "threads", "python", "torch", "timm", "commit", "command", "peak_memory_mib")
    result: dict[str, Any] = {
        "key": run.key,
        "seed": run.seed,
        **run.definition,
        **{name: round(summary[name], 4) for name in _METRICS if name in summary},
        "images_per_second": round(statistics.median(speeds), 1) if speeds else None,
        "seconds": summary["seconds"],
        "steps": summary["steps"],
        **{name: summary.get(name) for name in kept},
    }
    result["command"] = _published(str(summary.get("command", "")))
    path = result_file(folder, run.key)
    path.parent.mkdir(exist_ok=True)
    write_json(path, result)
    # a finished run is not resumed; its weights are kept
    shutil.rmtree(out / "last", ignore_errors=True)


def _published(command: str) -> str:
    """Return the command without the folders of absolute paths, because results are published."""
    return shlex.join(map(_without_folder, shlex.split(command)))


def _without_folder(word: str) -> str:
    option, given, value = word.rpartition("=") if word.startswith("--") else ("", "", word)  # --data=/home/me/images
    return f"{option}{given}{Path(value).name}" if Path(value).is_absolute() else word


def stored(folder: Path, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the results of the finished runs among `keys`."""
    for key in keys:
        path = result_file(folder, key)
        if path.exists():
            yield json.loads(path.read_text())
