# SPDX-License-Identifier: Apache-2.0
"""Drawings of detections: boxes, masks and labels over an image, precision-recall curves, the worst images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from sola_vision.colours import BLUE, GREEN, ORANGE, VERMILION
from sola_vision.fonts import pillow_font, save_figure
from sola_vision.tasks.coco_eval import RECALLS, THRESHOLDS, Score
from sola_vision.tasks.label_pictures import class_colours, enlargement
from sola_vision.wording import amount

_LABELLED = 40  # with more objects than this, classes are shown by colour alone
_CURVES = 12  # classes with a coloured curve and a legend entry
_WEAK = 0.5

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Shape:
    """An object in an image: box x0 y0 x1 y1, class (from 0), score (None for ground truth) and mask uint8 [H, W]."""

    box: Box
    label: int
    score: float | None = None
    mask: np.ndarray | None = None


def shape_of(entry: Mapping[str, Any], labels: Mapping[int, int], mask: np.ndarray | None = None) -> Shape:
    """Return the shape of a result or an annotation in COCO's format; `labels`: the class of each category id."""
    x, y, width, height = entry["bbox"]
    return Shape((x, y, x + width, y + height), labels[entry["category_id"]], entry.get("score"), mask)


def draw_shapes(image: Image.Image, shapes: Sequence[Shape], classes: Sequence[str]) -> Image.Image:
    """Return the image, enlarged if small, with its objects in their class colours; the highest score is on top."""
    factor = enlargement(image)
    colours = class_colours(len(classes))
    shapes = sorted(shapes, key=lambda shape: shape.score or 0)
    pixels = np.asarray(image.convert("RGB"), np.float32).copy()
    for shape in shapes:
        if shape.mask is not None:
            inside = shape.mask.astype(bool)
            pixels[inside] = _WEAK * pixels[inside] + _WEAK * colours[shape.label]
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    picture = picture.resize((factor * image.width, factor * image.height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    width = max(2, round(min(picture.size) / 300))
    for shape in shapes:
        x0, y0, x1, y1 = (factor * value for value in shape.box)
        draw.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=_rgb(colours[shape.label]), width=width)
    if len(shapes) <= _LABELLED:
        letters = "".join(["0123456789 %", *(classes[shape.label] for shape in shapes)])
        font = pillow_font(letters, max(13, min(picture.size) // 36))
        taken: list[Box] = []
        for shape in reversed(shapes):
            _write(draw, shape, classes[shape.label], _rgb(colours[shape.label]), font, factor, taken, picture.size)
    return picture


def _write(
    draw: ImageDraw.ImageDraw,
    shape: Shape,
    name: str,
    colour: tuple[int, ...],
    font: ImageFont.ImageFont | ImageFont.FreeTypeFont,
    factor: int,
    taken: list[Box],
    size: tuple[int, int],
) -> None:
    """Draw the label in the first free place: above the box, in its upper corner or below it; else leave it out."""
    text = name if shape.score is None else f"{name} {100 * shape.score:.0f} %"
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    wide, high = right - left + 6, bottom - top + 6
    x0, y0, _, y1 = (factor * value for value in shape.box)
    x = min(max(0, x0), max(0, size[0] - wide))
    for y in (y0 - high, y0, y1):
        place = (x, y, x + wide, y + high)
        inside = y >= 0 and y + high <= size[1]
        if inside and not any(_overlap(place, other) for other in taken):
            taken.append(place)
            draw.rectangle(place, fill=colour)
            # black or white, whichever has more contrast
            ink = "black" if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140 else "white"
            draw.text((x + 3 - left, y + 3 - top), text, fill=ink, font=font)
            return


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _rgb(colour: np.ndarray) -> tuple[int, ...]:
    return tuple(int(value) for value in colour)


def draw_curves(scores: Sequence[Score], out: Path) -> None:
    """Draw precision over recall, one row per kind: the mean over classes at several IoUs, and each class at 0.5."""
    figure = Figure(figsize=(12, 4.4 * len(scores)), layout="constrained")
    for row, score in zip(figure.subplots(len(scores), 2, squeeze=False), scores, strict=True):
        kind = "boxes" if score.kind == "bbox" else "masks"
        for threshold, colour in ((0.5, BLUE), (0.75, GREEN), (0.9, ORANGE)):
            index = int(np.flatnonzero(np.isclose(THRESHOLDS, threshold))[0])
            some = score.precision[index, :, :, 0, 2]
            if (defined := some.max(0) > -1).any():
                average = score.average(threshold=threshold)
                mean = some[:, defined].mean(1)
                row[0].plot(RECALLS, mean, color=colour, label=f"IoU {threshold:g}: AP {100 * average:.1f} %")
        row[0].set_title(f"{kind}: mean over the classes")
        order = sorted(range(len(score.classes)), key=lambda label: -_number(score.average(threshold=0.5, label=label)))
        named = [label for label in order if not math.isnan(score.average(threshold=0.5, label=label))]
        colours = class_colours(len(score.classes)) / 255
        for label in named[_CURVES:]:
            row[1].plot(RECALLS, score.curve(label), color="0.85", linewidth=0.8)
        for label in named[:_CURVES]:
            name = f"{score.classes[label]}: {100 * score.average(threshold=0.5, label=label):.1f} %"
            row[1].plot(RECALLS, score.curve(label), color=colours[label], linewidth=1.4, label=name)
        best = f", the best {_CURVES} of {len(named)} in colour" if len(named) > _CURVES else ""
        row[1].set_title(f"{kind}: each class at IoU 0.5{best}")
        for axes in row:
            axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
            if axes.lines:
                axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save_figure(figure, out, dpi=110)


def draw_worst(
    examples: Sequence[tuple[str, Image.Image, Sequence[Shape], Sequence[Shape], str]],
    classes: Sequence[str],
    out: Path,
) -> None:
    """Draw a sheet with one row per image from (name, image, true objects, detections, caption)."""
    figure = Figure(figsize=(12, 4.6 * max(1, len(examples))), layout="constrained")
    grid = figure.subplots(max(1, len(examples)), 2, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for row, (name, image, truth, found, caption) in zip(grid, examples, strict=False):
        titles = (f"{name}: {amount(len(truth), 'true object')}", f"{amount(len(found), 'detection')}: {caption}")
        for axes, shapes, title in zip(row, (truth, found), titles, strict=True):
            axes.imshow(draw_shapes(image, shapes, classes))
            axes.set_title(title, fontsize=8, color="black" if shapes is truth else VERMILION)
    save_figure(figure, out, dpi=100)


def matches(truth: Sequence[Shape], found: Sequence[Shape], overlap: float = 0.5) -> list[Shape]:
    """Return the detections that match a true object: same class, IoU of at least `overlap`, highest score first."""
    free = list(range(len(truth)))
    hits = []
    for shape in sorted(found, key=lambda shape: -(shape.score or 0)):
        candidates = [(box_overlap(shape.box, truth[i].box), i) for i in free if truth[i].label == shape.label]
        if candidates and max(candidates)[0] >= overlap:
            free.remove(max(candidates)[1])
            hits.append(shape)
    return hits


def counted(
    truth: Sequence[Shape], found: Sequence[Shape], crowds: Sequence[Shape], overlap: float = 0.5
) -> tuple[list[Shape], int]:
    """Return the detections that count and the number of correct ones.

    An unmatched detection on a crowd of its class does not count. As in COCO, its overlap with the crowd is a share
    of the detection's box.
    """
    right = matches(truth, found, overlap)

    def on_crowd(shape: Shape) -> bool:
        own = (shape.box[2] - shape.box[0]) * (shape.box[3] - shape.box[1])
        return any(c.label == shape.label and _shared(shape.box, c.box) >= overlap * own for c in crowds)

    return [s for s in found if any(s is hit for hit in right) or not on_crowd(s)], len(right)


def box_overlap(a: Box, b: Box) -> float:
    """Return the intersection over union of two boxes."""
    shared = _shared(a, b)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def _shared(a: Box, b: Box) -> float:
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    return width * height


def _number(value: float) -> float:
    return -1.0 if math.isnan(value) else value
