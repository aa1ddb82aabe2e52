# SPDX-License-Identifier: Apache-2.0
"""`sola eval --checkpoint FILE --data FOLDER`: how good a checkpoint is at the task it was trained for."""

from collections.abc import Sequence

from sola_vision.commands.dispatch import checkpoint_task, task_module


def run(arguments: Sequence[str]) -> None:
    task_module("evaluate", checkpoint_task(arguments)).run(arguments)
