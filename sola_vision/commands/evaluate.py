# SPDX-License-Identifier: Apache-2.0
"""`sola eval --checkpoint FILE --data FOLDER`: evaluate a checkpoint on the task it was trained for.

Files of any origin are scored without a checkpoint: detections with `--results RESULTS.json --annotations TRUTH.json`,
label PNGs with `--predictions FOLDER --annotations FOLDER --classes N --ignore LABEL`.
"""

from collections.abc import Sequence

from sola_vision.commands.dispatch import checkpoint_task, run_for_task

_FILES = {"--results": "detection", "--predictions": "segmentation"}


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    words = [word.partition("=")[0] for word in arguments]
    option = next((option for option in _FILES if option in words), "--checkpoint")
    run_for_task("evaluate", _FILES.get(option) or checkpoint_task(arguments), option, arguments)
