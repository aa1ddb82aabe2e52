# SPDX-License-Identifier: Apache-2.0
"""`sola predict IMAGE-OR-FOLDER --checkpoint FILE`: the predictions of a checkpoint of any task."""

from collections.abc import Sequence

from sola_vision.commands.dispatch import checkpoint_task, run_for_task


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    run_for_task("predict", checkpoint_task(arguments), "--checkpoint", arguments)
