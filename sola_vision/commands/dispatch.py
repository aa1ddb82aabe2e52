# SPDX-License-Identifier: Apache-2.0
"""Which task a command is about: a recipe says its own, a checkpoint has it in its metadata.

Every task has the modules train_TASK, evaluate_TASK and predict_TASK; only the one that is needed is imported.
train_TASK has `prepare(asked) -> Job`, the others `run(arguments, ...)`.
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
    """All that `sola train` needs to know of a task; nothing has been written yet."""

    task: Task
    model: nn.Module
    train_set: Dataset[Any]
    val_set: Dataset[Any]
    metadata: dict[str, str]  # of the checkpoint; "classes" are compared when a run goes on
    says: str  # what is trained on what, for people
    shown: tuple[str, ...]  # metrics of the last line
    report: str | None = None  # what the start from a checkpoint took over
    kept: str = ""  # the part of the model that best.safetensors holds; "" = all of it
    collate: Collate | None = None
    eval_collate: Collate | None = None


def task_module(verb: str, task: str) -> ModuleType:
    """The module of a verb (train, evaluate, predict) for a task."""
    return importlib.import_module(f"sola_vision.commands.{verb}_{task}")


def checkpoint_task(arguments: Sequence[str]) -> str:
    """The task of the checkpoint on a command line; without one the first, whose parser says what is missing."""
    words = list(arguments)
    given = [value for word, value in pairwise(words) if word == "--checkpoint"]
    given += [word.partition("=")[2] for word in words if word.startswith("--checkpoint=")]
    if not given:
        return TASKS[0]
    path, values = read_description(given[-1])
    task = values["task"]
    if task not in TASKS:
        raise ValueError(f"{path} is of the task {task!r}, which this version does not know ({', '.join(TASKS)})")
    return task
