# SPDX-License-Identifier: Apache-2.0
"""`sola train RECIPE --data FOLDER`: trains a network and leaves a run's folder. What differs from task to task is in
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
from sola_vision.commands.options import Run, parse_run
from sola_vision.engine import World, check_folder, distributed, fit, read_metadata
from sola_vision.engine.checkpoint import BEST, Progress, load_progress
from sola_vision.engine.loading import count_epoch_steps
from sola_vision.engine.log import json_text, write_text
from sola_vision.engine.optim import count_steps, make_optimizer
from sola_vision.tasks.pictures import draw_learning_curve


def run(arguments: Sequence[str]) -> None:
    asked = parse_run(arguments)
    with distributed(asked.configuration.train.device) as world:
        _run(asked, world)


def _run(asked: Run, world: World) -> None:
    settings = asked.configuration.train
    # everything that can be wrong is looked at before anything is written
    check_folder(out_folder(asked.out), asked.resume)
    job: Job = task_module("train", asked.configuration.task).prepare(asked, world)
    total = count_steps(settings, count_epoch_steps(len(job.train_set), settings))  # type: ignore[arg-type]  # torch does not promise a length
    if asked.resume:
        _check_classes(asked.out, load_progress(asked.out, total, settings.optimizer), job.metadata["classes"])
    make_optimizer(job.model.to(world.device), settings)  # some only run on a GPU
    if settings.strategy == "fsdp" and not torch.distributed.is_initialized():
        raise ValueError("--train.strategy fsdp needs processes: start with torchrun --nproc-per-node N, or use ddp")

    if world.is_main:
        if job.report:
            print(job.report, file=sys.stderr)
        print(f"{job.says}; the run's folder is {asked.out}", file=sys.stderr)
        if settings.amp == "bf16" and world.device.type == "cpu" and not _cpu_has_bfloat16():
            print("sola: this CPU only emulates bfloat16; --train.amp none trains in float32", file=sys.stderr)
    summary = fit(
        job.task,
        job.model,
        job.train_set,
        job.val_set,
        settings,
        asked.out,
        resume=asked.resume,
        metadata=job.metadata,
        kept=job.kept,
        collate=job.collate,
        eval_collate=job.eval_collate,
        begin=lambda: _keep(asked),
    )
    if world.is_main:
        draw_learning_curve(asked.out / "metrics.jsonl", asked.out / "curve.png", job.task.metric)
        _report(summary, job.shown, asked)


def _keep(asked: Run) -> None:
    """What the run was asked for, which the next --resume goes by; what this one changes is said."""
    asked.out.mkdir(parents=True, exist_ok=True)
    config = asked.out / "config.yaml"
    if asked.resume and config.is_file() and (changed := asked.changes(config.read_text(encoding="utf-8"))):
        print(f"the run goes on with another configuration: {', '.join(changed)}", file=sys.stderr)
    write_text(config, asked.text)


def _cpu_has_bfloat16() -> bool:
    # torch knows it of oneDNN alone; without that library nothing is said
    return not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _check_classes(folder: Path, progress: Progress | None, told: str) -> None:
    """A run that goes on with other classes in as many outputs would not be noticed anywhere else."""
    said = {} if progress is None else progress.metadata
    if not said and (folder / BEST).exists():  # the states of older versions do not name classes
        said = read_metadata(folder / BEST)
    before, classes = json.loads(said.get("classes", "null")), json.loads(told)
    if before is not None and before != classes:
        differing = [name for name in [*before, *classes] if (name in before) != (name in classes)] or classes
        raise ValueError(
            f"{folder} was trained on other classes ({differing[0]!r} is not in both): resume with the same data"
        )


def _report(summary: dict[str, Any], shown: Sequence[str], asked: Run) -> None:
    if asked.json:
        print(json_text(summary))
        return
    numbers = " ".join(f"{name} {summary[name]:.2f}" for name in shown if name in summary)
    # the file's weights may be of an earlier evaluation than the last, whose numbers these are
    metric, best = summary["metric"], summary["best"]
    of = f" ({metric} {best[metric]:.2f} at step {best['step']})" if best and best["step"] != summary["steps"] else ""
    print(f"{numbers}; best.safetensors{of}, curve.png and summary.json are in {asked.out}")
