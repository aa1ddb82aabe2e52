# SPDX-License-Identifier: Apache-2.0
"""The task of a command, which a recipe defines and a checkpoint stores in its metadata, and the module for it.

Every task has the modules train_TASK, evaluate_TASK and predict_TASK; only the one that is needed is imported.
train_TASK has `prepare(request, world) -> Job`, the others `make_parser()` and `run(arguments)`.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from sola_vision.engine import Task
from sola_vision.engine.loading import Collate
from sola_vision.tasks import read_description

TASKS = ("classification", "detection", "segmentation")


@dataclass(kw_only=True)
class Job:
    """All that `sola train` needs for a run of a task; nothing has been written yet."""

    task: Task
    model: nn.Module
    train_set: Dataset[Any]
    val_set: Dataset[Any]
    metadata: dict[str, str]  # of the checkpoint; "classes" are compared when a run is resumed
    description: str  # the network and its data in one line
    printed_metrics: tuple[str, ...]  # in the last line of the output
    report: str | None = None  # what was loaded from the checkpoint of --init
    note: str | None = None  # on the data, printed after the description
    kept: str = ""  # the submodule that best.safetensors contains; "" = the whole model
    collate: Collate | None = None
    eval_collate: Collate | None = None


def task_module(verb: str, task: str) -> ModuleType:
    """Import and return the module of a verb (train, evaluate, predict) for a task."""
    return importlib.import_module(f"sola_vision.commands.{verb}_{task}")


def run_for_task(verb: str, task: str, source: str, arguments: Sequence[str]) -> None:
    """Run evaluate or predict for a task, which the option `source` defines.

    Raises ValueError for an option that only other tasks have; the message names these.
    """
    module = task_module(verb, task)
    parser = module.make_parser()
    for word in parser.parse_known_args(list(arguments))[1]:
        others = [other for other in TASKS if task_module(verb, other).make_parser().has_option(word)]
        if others:
            parser.error(
                f"{word.partition('=')[0]} is an option for {' and '.join(others)}, but {source} is for {task}"
            )
    module.run(arguments)


def checkpoint_task(arguments: Sequence[str]) -> str:
    """Return the task of --checkpoint; without one the first task, whose parser reports the missing option."""
    words = list(arguments)
    given = [value for word, value in pairwise(words) if word == "--checkpoint"]
    given += [word.partition("=")[2] for word in words if word.startswith("--checkpoint=")]
    if not given:
        return TASKS[0]
    path, values = read_description(given[-1])
    task = values["task"]
    if task not in TASKS:
        raise ValueError(f"{path}: task {task!r} is not supported by this version ({', '.join(TASKS)})")
    return task
