# SPDX-License-Identifier: Apache-2.0
"""A scale, images and a study that take seconds. As a script (`python little.py DATA OUT [STEP]`) it runs the study,
and kills itself within that step's loss, counted over all runs, as kill -9 would.
"""

import os
import signal
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from sola_vision import config
from sola_vision.config import SolaConfig
from sola_vision.data import SegmentationConfig
from sola_vision.engine import TrainConfig
from sola_vision.studies import Scale, custom, plan, run_plan
from sola_vision.studies.outcome import write_plan
from sola_vision.studies.scales import SegmentationScale
from sola_vision.tasks import UPerNetConfig

CLASSES = ("ant", "bee", "cat")

LITTLE = Scale(
    name="little",
    what="a network for tests",
    hierarchical=SolaConfig(schedule="L/LS", dims=(8, 16), patch_size=2, img_size=8, head_dim=8),
    isotropic=SolaConfig(schedule="LS", dims=(16,), patch_size=2, img_size=8, head_dim=8),
    images=None,
    limit=36,
    epochs={"hierarchical": 2, "isotropic": 1},
    train=TrainConfig(
        batch_size=8, lr=2e-3, warmup_epochs=0.2, workers=0, evaluate_every=1000, save_steps=2, log_every=2
    ),
    seeds=2,
    segmentation=SegmentationScale(
        what="a segmenter for tests",
        networks={"tiny": config.nano(dims=(8, 8, 16, 16), head_dim=8)},
        head=UPerNetConfig(channels=8, auxiliary_channels=8),
        images=SegmentationConfig(size=32, crop=32),
        train=TrainConfig(steps=4, batch_size=4, lr=2e-3, warmup_steps=1, workers=0, evaluate_every=1000, save_steps=2),
    ),
)


def write_images(root, train=14, val=5, size=8):
    """Write images of noise around a colour per class."""
    draw = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        colour = np.array([60 + 60 * label, 200 - 50 * label, 120])
        for split, count in (("train", train), ("val", val)):
            folder = Path(root) / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = (colour + draw.normal(0, 60, (size, size, 3))).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    return str(root)


def write_masks(root, train=6, val=2, size=32):
    """Write images of three stripes of different width, with labels; the last column is ignored."""
    draw = np.random.default_rng(0)
    colours = np.array([[60, 200, 120], [120, 150, 120], [180, 100, 120]])
    for split, count in (("train", train), ("val", val)):
        for kind in ("images", "annotations"):
            (Path(root) / kind / split).mkdir(parents=True)
        for index in range(count):
            first, second = sorted(draw.integers(4, size - 4, 2))
            labels = np.zeros((size, size), np.uint8)
            labels[first:], labels[second:], labels[:, -1] = 1, 2, 255
            pixels = colours[labels.clip(0, 2)] + draw.normal(0, 30, (size, size, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(Path(root) / f"images/{split}/{index}.png")
            Image.fromarray(labels).save(Path(root) / f"annotations/{split}/{index}.png")
    (Path(root) / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
    return str(root)


def planned(data, scale=LITTLE, schedules=("L/LL", "L/LS"), **options):
    return plan(custom(schedules), scale, data, device="cpu", **options)


def run(plan_, out, say=lambda text: None):
    write_plan(Path(out), plan_.description)
    return run_plan(plan_, Path(out), say)


def main(data, out, step=None):
    import torch

    from sola_vision.tasks import Classification

    torch.set_num_threads(1)
    loss, left = Classification.loss, [int(step) if step else 0]

    def die(self, model, batch):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(self, model, batch)

    Classification.loss = die
    run(planned(data), out, print)


if __name__ == "__main__":
    main(*sys.argv[1:])
