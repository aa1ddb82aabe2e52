# SPDX-License-Identifier: Apache-2.0
"""What a run that goes on finds in its folder: whether there is one, what has changed since, which images are bad."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from .checkpoint import BEST, STATE, Progress
from .config import TrainConfig, list_changes
from .log import METRICS, SUMMARY, check_untaken


def check_folder(folder: Path, resume: bool) -> None:
    """Refuses to overwrite a run, and to resume where there is none. A command line asks before it writes there.

    What ended before its first checkpoint has left nothing that is worth keeping.
    """
    check_untaken(folder)
    kept = [name for name in (STATE, BEST, SUMMARY) if (folder / name).exists()]
    if kept and not resume:
        raise ValueError(f"{folder} already holds a run: resume it or choose another folder")
    if kept and STATE not in kept:  # it would begin anew, over the results
        raise ValueError(
            f"{folder} holds {kept[0]} but no {STATE}, so that nothing can go on: choose another folder (--out), "
            f"and --init {folder} to start from these weights"
        )
    if resume and not kept and not (folder / METRICS).exists():
        raise FileNotFoundError(f"{folder} holds no run to resume: check the path, or start without resuming")


def changes(before: Progress, config: TrainConfig, images: Mapping[str, int]) -> list[str]:
    """Settings and numbers of images that are not those of the state, as words."""
    changed = list_changes(before.config, json.loads(json.dumps(asdict(config))))
    return changed + [
        f"{number} {name} images (was {then})"
        for name, number in images.items()
        if (then := before.images.get(name, number)) != number
    ]


def known_failures(before: Progress, images: Mapping[str, int]) -> dict[str, dict[int, str]]:
    """Images of each set that could not be read; in a set of another size they are other images."""
    return {
        name: {int(index): text for index, text in some.items()}
        for name, some in before.skipped.items()
        if images[name] == before.images.get(name, images[name])
    }
