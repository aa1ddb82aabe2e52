# SPDX-License-Identifier: Apache-2.0
"""`sola eval --checkpoint FILE --data FOLDER`: how good a checkpoint is at the task it was trained for.

Without a checkpoint it scores what others have written: `--results RESULTS.json --annotations TRUTH.json` detections,
`--predictions FOLDER --annotations FOLDER --classes N --ignore LABEL` label PNGs.
"""

from collections.abc import Sequence

from sola_vision.commands.dispatch import checkpoint_task, task_module

_FILES = {"--results": "detection", "--predictions": "segmentation"}


def run(arguments: Sequence[str]) -> None:
    words = [word.partition("=")[0] for word in arguments]
    task = next((task for option, task in _FILES.items() if option in words), None)
    task_module("evaluate", task or checkpoint_task(arguments)).run(arguments)
