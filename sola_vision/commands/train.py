# SPDX-License-Identifier: Apache-2.0
"""`sola train RECIPE --data FOLDER`: train a network, and write a run's folder. The parts that differ by task are in
train_TASK.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sola_vision.commands.arguments import out_folder
from sola_vision.commands.dispatch import Job, task_module
from sola_vision.commands.options import Run, option_errors, parse_run
from sola_vision.engine import World, check_folder, distributed, fit, read_metadata
from sola_vision.engine.checkpoint import BEST, STATE, Progress
from sola_vision.engine.loading import count_epoch_steps
from sola_vision.engine.log import json_text, metric_texts, write_text
from sola_vision.engine.optim import count_steps, make_optimizer
from sola_vision.engine.resuming import resumable_progress
from sola_vision.tasks.pictures import draw_learning_curve


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    request = parse_run(arguments)
    with distributed(request.configuration.train.device) as world:
        _run(request, world)


def _run(request: Run, world: World) -> None:
    settings = request.configuration.train
    # check everything that can fail before anything is written
    out_folder(request.out)
    # the data before the folder: a default folder often exists, which would hide a wrong --data
    job: Job = task_module("train", request.configuration.task).prepare(request, world)
    check_folder(request.out, request.resume)
    with option_errors("train", vars(settings)):
        total = count_steps(settings, count_epoch_steps(len(job.train_set), settings))  # type: ignore[arg-type]  # torch's Dataset type does not declare __len__
    if request.resume:
        with option_errors("train", vars(settings)):
            progress = resumable_progress(request.out, settings, total)
        _check_classes(request.out, progress, job.metadata["classes"])
    with option_errors("train", vars(settings)):
        make_optimizer(job.model.to(world.device), settings)  # some optimisers need a GPU
    if settings.strategy == "fsdp" and not torch.distributed.is_initialized():
        raise ValueError("--train.strategy fsdp needs processes: start with torchrun --nproc-per-node N, or use ddp")

    if world.is_main:
        if job.report:
            print(job.report, file=sys.stderr)
        print(f"{job.description}; {_origin(request)}the run's folder is {request.out}", file=sys.stderr)
        if job.note:
            print(job.note, file=sys.stderr)
        if settings.amp == "bf16" and world.device.type == "cpu" and not _cpu_has_bfloat16():
            print("sola: this CPU only emulates bfloat16; --train.amp none trains in float32", file=sys.stderr)
    summary = fit(
        job.task,
        job.model,
        job.train_set,
        job.val_set,
        settings,
        request.out,
        resume=request.resume,
        metadata=job.metadata,
        kept=job.kept,
        collate=job.collate,
        eval_collate=job.eval_collate,
        begin=lambda: _write_config(request),
    )
    if world.is_main:
        draw_learning_curve(request.out / "metrics.jsonl", request.out / "curve.png", job.task.metric)
        _report(summary, job, request)


def _origin(request: Run) -> str:
    """Name random initial weights; a line before names those of --init, a later one those of a resumed run."""
    resumed = request.resume and (request.out / STATE).exists()
    return "" if request.start or resumed else "random weights; "


def _write_config(request: Run) -> None:
    """Write config.yaml, which the next --resume reads, and print what a resumed run changes."""
    request.out.mkdir(parents=True, exist_ok=True)
    config = request.out / "config.yaml"
    if request.resume and config.is_file() and (changed := request.changes(config.read_text(encoding="utf-8"))):
        print(f"the run continues with another configuration: {', '.join(changed)}", file=sys.stderr)
    write_text(config, request.text)


def _cpu_has_bfloat16() -> bool:
    # torch can tell for oneDNN only; without that library the warning is not printed
    return not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _check_classes(folder: Path, progress: Progress | None, new: str) -> None:
    """Raise ValueError if a resumed run has other classes; if as many, no other check would fail."""
    stored = {} if progress is None else progress.metadata
    if not stored and (folder / BEST).exists():  # states of older versions do not store the classes
        stored = read_metadata(folder / BEST)
    before, classes = json.loads(stored.get("classes", "null")), json.loads(new)
    if before is not None and before != classes:
        differing = [name for name in [*before, *classes] if (name in before) != (name in classes)] or classes
        raise ValueError(
            f"{folder} was trained on other classes ({differing[0]!r} is not in both): resume with the same data"
        )


def _report(summary: dict[str, Any], job: Job, request: Run) -> None:
    if request.json:
        print(json_text(summary))
        return
    texts = metric_texts(job.task, summary, ".2f")
    numbers = ", ".join(texts[name] for name in job.printed_metrics if name in texts)
    # the numbers are of the last evaluation, the weights in the file may be of an earlier one
    best = summary["best"]
    of = ""
    if best and best["step"] != summary["steps"]:
        of = f" ({metric_texts(job.task, best, '.2f')[summary['metric']]} at step {best['step']})"
    print(f"{numbers}; best.safetensors{of}, curve.png and summary.json are in {request.out}")
