# SPDX-License-Identifier: Apache-2.0
"""Checks when a run resumes: whether its folder holds a run, what has changed since, which images are unreadable."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ..wording import amount
from .checkpoint import BEST, STATE, Progress, load_progress
from .config import TrainConfig, list_changes
from .log import METRICS, SUMMARY, check_unlocked


def check_folder(folder: Path, resume: bool) -> None:
    """Raise an error if `folder` holds a run and `resume` is false, or no run and `resume` is true.

    Commands call this before they write to the folder. A run that ended before its first checkpoint does not count.
    """
    check_unlocked(folder)
    kept = [name for name in (STATE, BEST, SUMMARY) if (folder / name).exists()]
    if kept and not resume:
        raise ValueError(f"{folder} already holds a run: resume it (--resume) or choose another folder (--out)")
    if kept and STATE not in kept:  # it would start over and overwrite the results
        raise ValueError(
            f"{folder} holds {kept[0]} but no {STATE} and cannot be resumed: choose another folder (--out), "
            f"with --init {folder} to start from these weights"
        )
    if resume and not kept and not (folder / METRICS).exists():
        raise FileNotFoundError(f"{folder} holds no run to resume: check the path (--out), or start without --resume")


def resumable_progress(folder: Path, config: TrainConfig, total: int) -> Progress | None:
    """Return the `Progress` of the folder's state, or None if no state has been saved.

    Raise ValueError if a run of `total` steps with this configuration cannot continue from it.
    """
    progress = load_progress(folder)
    if progress is None:
        return None
    before = progress.config
    instead = "or start a new run from its weights"
    then = before.get("optimizer", config.optimizer)
    if config.optimizer != then:
        raise ValueError(
            f"optimizer={config.optimizer!r} cannot resume from the state of {then!r} in {folder}: resume with "
            f"{then!r}, {instead}"
        )
    if config.ema and not before.get("ema", config.ema):
        raise ValueError(
            f"ema={config.ema} cannot resume {folder}, which has no moving average: resume with 0, {instead}"
        )
    size = before.get("batch_size", config.batch_size)
    if config.batch_size != size and config.steps is None:  # the epoch, and with it the learning rate, would jump
        raise ValueError(
            f"batch_size={config.batch_size} cannot resume {folder}, whose position is a number of batches of {size}: "
            f"resume with {size} (accumulate divides a batch that exceeds the memory), {instead}"
        )
    if progress.step > total:
        raise ValueError(
            f"{folder} is at step {progress.step}, past the {amount(total, 'step')} of this run: it was started with "
            "more images or epochs; resume it with those, or choose another folder"
        )
    return progress


def changes(before: Progress, config: TrainConfig, images: Mapping[str, int]) -> list[str]:
    """Return a readable line for each setting and number of images that differs from the saved state."""
    changed = list_changes(before.config, json.loads(json.dumps(asdict(config))))
    return changed + [
        f"{amount(number, f'{name} image')} (was {then:,})"
        for name, number in images.items()
        if (then := before.images.get(name, number)) != number
    ]


def known_failures(before: Progress, images: Mapping[str, int]) -> dict[str, dict[int, str]]:
    """Return the unreadable images of each dataset; none if its size changed, as indices then mean other images."""
    return {
        name: {int(index): text for index, text in some.items()}
        for name, some in before.skipped.items()
        if images[name] == before.images.get(name, images[name])
    }
