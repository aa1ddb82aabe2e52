# SPDX-License-Identifier: Apache-2.0
"""Data, options and processes small enough to train, kill and compare within seconds."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["ant", "bee", "cat", "dog", "emu", "fox", "gnu"]  # more than five, or top-5 would be 100
TINY = [
    *("train", "digits", "--model.dims", "[8,16,32,32]", "--train.epochs", "1", "--train.warmup_epochs", "0"),
    *("--train.batch_size", "7", "--train.log_every", "1", "--train.evaluate_every", "1", "--train.device", "cpu"),
    # an odd batch, which the recipe's mixing in pairs would refuse
    *("--image.mixup", "0"),
]


def python(*words, **changes):
    """A command in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, env=environment, check=False
    )


def write_images(root, classes=CLASSES, train=6, val=(1, 2, 3, 4), size=32):
    """Noise around a colour of each class; `val` are the classes' counts, in turn."""
    random = np.random.default_rng(0)
    for label, name in enumerate(classes):
        colour = np.random.default_rng(label).uniform(40, 215, 3)
        for split, count in (("train", train), ("val", val[label % len(val)])):
            folder = Path(root) / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = (colour + random.normal(0, 40, (size, size, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return Path(root)
