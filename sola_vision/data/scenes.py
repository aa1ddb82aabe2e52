# SPDX-License-Identifier: Apache-2.0
"""Generated scenes: coloured shapes of several scales on a textured background, with labels for every task.

They are used for tests and demos of classification, detection and segmentation without real data. A scene is a function
of (seed, index). Shapes do not overlap, so that its COCO polygon, mask and box agree exactly.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

CLASSES = ("disc", "square", "triangle", "cross")

# areas as fractions of the square of the shorter side
_LARGEST = (0.07, 0.16)
_SMALLEST = 0.008
_SMALLEST_PIXELS = 8
_SECOND = 0.5  # maximum area of other shapes relative to the largest, so that the scene's class is unambiguous
_TURN = math.pi / 9  # shapes are rotated by up to 20 degrees in either direction


@dataclass(frozen=True)
class Scene:
    """One image and its labels; n shapes, the largest first."""

    image: Image.Image
    label: int  # class of the largest shape
    boxes: Tensor  # [n, 4] x0 y0 x1 y1 in pixels; x1 and y1 are exclusive
    labels: Tensor  # [n] from 0
    masks: Tensor  # [n, H, W] bool
    semantic: Tensor  # [H, W] 0 is the background, 1 + class elsewhere
    polygons: tuple[tuple[tuple[float, float], ...], ...]  # a pixel belongs to a mask if its centre lies inside


class Scenes(Dataset[Scene]):
    """`count` scenes of `size` (H, W) with one to `most` shapes each."""

    def __init__(self, count: int, size: tuple[int, int] = (64, 64), seed: int = 0, *, most: int = 5) -> None:
        if min(size) < 16:
            raise ValueError(f"size {size}: shapes need at least 16x16 pixels")
        self.count, self.size, self.seed, self.most = count, size, seed, most
        self.classes = list(CLASSES)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        rng = np.random.default_rng([self.seed, index])
        return _paint(rng, self.size, _place(rng, self.size, self.most))


def write_classification(root: str | Path, per_class: int, size: tuple[int, int] = (64, 64), seed: int = 0) -> None:
    """Write ROOT/train/CLASS/*.png with `per_class` images per class, and ROOT/val/CLASS/*.png with a quarter of it."""
    scenes = iter(_endless(size, seed))
    for split, wanted in (("train", per_class), ("val", max(1, per_class // 4))):
        counts = dict.fromkeys(range(len(CLASSES)), 0)
        while min(counts.values()) < wanted:
            scene = next(scenes)
            if counts[scene.label] < wanted:
                file = Path(root) / split / CLASSES[scene.label] / f"{counts[scene.label]:05d}.png"
                counts[scene.label] += 1
                _save(scene.image, file)


def write_coco(root: str | Path, train: int, val: int, size: tuple[int, int] = (128, 128), seed: int = 0) -> None:
    """Write ROOT/{train,val}/*.png and ROOT/annotations/instances_{train,val}.json; category ids start at 1."""
    scenes = iter(_endless(size, seed))
    categories = [{"id": 1 + k, "name": name, "supercategory": "shape"} for k, name in enumerate(CLASSES)]
    for split, count in (("train", train), ("val", val)):
        images: list[dict[str, object]] = []
        annotations: list[dict[str, object]] = []
        for number in range(1, count + 1):
            scene = next(scenes)
            name = f"{number:06d}.png"
            _save(scene.image, Path(root) / split / name)
            images.append({"id": number, "file_name": name, "height": size[0], "width": size[1]})
            for box, label, mask, polygon in zip(
                scene.boxes.tolist(), scene.labels.tolist(), scene.masks, scene.polygons, strict=True
            ):
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": 1 + label,
                        "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                        "area": int(mask.sum()),
                        "segmentation": [[number for point in polygon for number in point]],
                        "iscrowd": 0,
                    }
                )
        file = Path(root) / "annotations" / f"instances_{split}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(
            json.dumps({"images": images, "annotations": annotations, "categories": categories}), encoding="utf-8"
        )


def write_segmentation(
    root: str | Path, train: int, val: int, size: tuple[int, int] = (128, 128), seed: int = 0
) -> None:
    """Write ROOT/images/{train,val}/*.png and ROOT/annotations/{train,val}/*.png; label 0 (background) is a class."""
    scenes = iter(_endless(size, seed))
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            scene = next(scenes)
            _save(scene.image, Path(root) / "images" / split / f"{number:05d}.png")
            labels = Image.fromarray(scene.semantic.numpy().astype(np.uint8))
            _save(labels, Path(root) / "annotations" / split / f"{number:05d}.png")
    names = ("ground", *CLASSES)
    lines = "".join(f"{label} {name}\n" for label, name in enumerate(names))
    (Path(root) / "classes.txt").write_text(lines, encoding="utf-8")


def _endless(size: tuple[int, int], seed: int) -> Iterator[Scene]:
    scenes = Scenes(1 << 62, size, seed)
    return (scenes[index] for index in range(len(scenes)))


def _save(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def _outline(kind: int) -> np.ndarray:
    """Return the corners [k, 2] of shape `kind`, centred, with area 1."""
    if CLASSES[kind] == "disc":
        angles = np.arange(24) * (2 * np.pi / 24)
        corners = np.stack([np.cos(angles), np.sin(angles)], 1)
    elif CLASSES[kind] == "square":
        corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], float)
    elif CLASSES[kind] == "triangle":
        angles = np.array([-90, 30, 150]) * (np.pi / 180)
        corners = np.stack([np.cos(angles), np.sin(angles)], 1)
    else:
        arm = 0.33
        quarter = np.array([(arm, -1), (arm, -arm), (1, -arm)])
        turn = np.array([[0, 1], [-1, 0]])
        corners = np.concatenate([quarter, quarter @ turn, quarter @ turn @ turn, quarter @ turn @ turn @ turn])
    x, y = corners.T
    area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    return corners / math.sqrt(area)


_OUTLINES = tuple(_outline(kind) for kind in range(len(CLASSES)))


def _place(rng: np.random.Generator, size: tuple[int, int], most: int) -> list[tuple[int, np.ndarray]]:
    """Return shapes (class, corners [k, 2] in pixels) that lie inside the image and do not overlap."""
    height, width = size
    square = min(size) ** 2
    first = rng.uniform(*_LARGEST)
    smallest = max(_SMALLEST, _SMALLEST_PIXELS / square)
    placed: list[tuple[float, float, float]] = []
    shapes = []
    for number in range(rng.integers(1, most + 1)):
        kind = int(rng.integers(len(CLASSES)))
        # logarithmic, so that small ones are as frequent as large ones
        part = first if number == 0 else math.exp(rng.uniform(math.log(smallest), math.log(_SECOND * first)))
        corners = _OUTLINES[kind] * math.sqrt(part * square)
        radius = float(np.linalg.norm(corners, axis=1).max()) + 1
        for _ in range(30):
            x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
            if all(math.hypot(x - other_x, y - other_y) > radius + other for other_x, other_y, other in placed):
                angle = rng.uniform(-_TURN, _TURN)
                turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
                # rounded before drawing, so that the JSON polygon equals the mask exactly
                shapes.append((kind, np.round(corners @ turn + (x, y), 2)))
                placed.append((x, y, radius))
                break
    return shapes


def _paint(rng: np.random.Generator, size: tuple[int, int], shapes: list[tuple[int, np.ndarray]]) -> Scene:
    height, width = size
    # the background is dull and dark, shapes are bright and of any hue: colour separates them but not their classes
    coarse = rng.uniform(50, 120, 3) + rng.uniform(-30, 30, (height // 8 + 2, width // 8 + 2, 3))
    pixels = np.asarray(
        Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BILINEAR)
    ).astype(float)
    masks = np.zeros((len(shapes), height, width), bool)
    boxes = np.zeros((len(shapes), 4), np.float32)
    semantic = np.zeros((height, width), np.int64)
    for mask, box, (kind, corners) in zip(masks, boxes, shapes, strict=True):
        _fill(mask, corners)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        semantic[mask] = 1 + kind
        hue, value = rng.uniform(0, 6), rng.uniform(200, 255)
        ramp = np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1  # hue to RGB, before clipping
        pixels[mask] = value * (0.15 + 0.85 * ramp.clip(0, 1))
    pixels += rng.normal(0, 8, pixels.shape)
    return Scene(
        image=Image.fromarray(np.rint(pixels).clip(0, 255).astype(np.uint8)),
        label=shapes[0][0],
        boxes=torch.from_numpy(boxes),
        labels=torch.tensor([kind for kind, _ in shapes]),
        masks=torch.from_numpy(masks),
        semantic=torch.from_numpy(semantic),
        polygons=tuple(tuple((float(x), float(y)) for x, y in corners) for _, corners in shapes),
    )


def _fill(mask: np.ndarray, corners: np.ndarray) -> None:
    """Set the pixels of `mask` [H, W] whose centres lie inside the polygon (even-odd rule)."""
    y = np.arange(mask.shape[0])[:, None] + 0.5
    x = np.arange(mask.shape[1])[None, :] + 0.5
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if y0 != y1:
            mask ^= ((y0 > y) != (y1 > y)) & (x < x0 + (x1 - x0) * (y - y0) / (y1 - y0))
