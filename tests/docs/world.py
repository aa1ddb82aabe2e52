# SPDX-License-Identifier: Apache-2.0
"""A folder in which the names of the pages exist: FOLDER, PICTURE.jpg, cifar10.tar, runs/few_images, ... all small."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
from pages import ROOT
from PIL import Image

from sola_vision.cli import main
from sola_vision.data import scenes

# names of folders by what lies in them
CLASSES = ("IMAGES", "cifar10_small", "caltech16", "IMAGENET")
OBJECTS = ("OBJECTS", "dsb2018_nuclei", "bccd", "coco_mini")
MASKS = ("MASKS", "CAMVID", "camvid")


def write(root):
    """Data alone; `train` adds the runs that pages begin with."""
    scenes.write_classification(root / "IMAGES", per_class=12, size=(32, 40))
    scenes.write_coco(root / "OBJECTS", train=8, val=2, size=(64, 80))
    scenes.write_segmentation(root / "MASKS", train=8, val=2, size=(64, 80))
    for first, *others in (CLASSES, OBJECTS, MASKS):
        for name in others:
            (root / name).symlink_to(first)
    with tarfile.open(root / "cifar10.tar", "w") as tar:
        tar.add(root / "IMAGES", "cifar10")
    for folder in ("PICTURES", "IMAGE-OR-FOLDER", "photographs"):
        (root / folder).mkdir()
        for number in range(2):
            _picture(root / folder / f"{number}.jpg", number)
    for name in ("PICTURE.jpg", "photo.jpg"):
        _picture(root / name, 7)
    _results(root)
    _labels(root)
    shutil.copytree(ROOT / "docs/studies", root / "docs/studies")
    for folder in ("examples", "benchmarks"):
        (root / folder).mkdir()
    for file in (*(ROOT / "examples").iterdir(), *(ROOT / "benchmarks").glob("*.py")):
        (root / file.parent.name / file.name).symlink_to(file)


def train(root):
    short = ["--train.warmup_epochs", "0", "--train.workers", "0"]
    for recipe, data, more in (
        ("few_images", "IMAGES", ["--image.size", "32", "--train.epochs", "1", "--train.batch_size", "8"]),
        ("few_objects", "OBJECTS", ["--image.size", "64", "--image.crop", "null", "--train.epochs", "1"]),
        ("few_masks", "MASKS", ["--image.size", "64", "--image.crop", "64", "--train.steps", "2", "--train.batch_size", "2", "--train.warmup_steps", "0"]),
    ):  # fmt: skip
        words = ["train", recipe, "--data", str(root / data), "--out", str(root / "runs" / recipe)]
        assert main([*words, *more, *(short if recipe != "few_masks" else short[2:])]) == 0


def _picture(file, seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (90, 130, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


def _results(root):
    """Everything that is there is found, in COCO's form."""
    truth = json.loads((root / "OBJECTS/annotations/instances_val.json").read_text())
    (root / "TRUTH.json").write_text(json.dumps(truth))
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    from sola_vision.data import encode_mask

    results = []
    for one in truth["annotations"]:
        x, y, width, height = (round(number) for number in one["bbox"])
        mask = np.zeros(sizes[one["image_id"]], bool)
        mask[y : y + height, x : x + width] = True
        found = {name: one[name] for name in ("image_id", "category_id", "bbox")}
        results.append({**found, "score": 0.9, "segmentation": encode_mask(mask)})
    (root / "RESULTS.json").write_text(json.dumps(results))


def _labels(root):
    random = np.random.default_rng(0)
    for folder in ("MINE", "TRUTH"):
        (root / folder).mkdir()
        for number in range(2):
            labels = random.integers(1, 151, (20, 30), dtype=np.uint8)
            Image.fromarray(labels).save(Path(root) / folder / f"{number}.png")
