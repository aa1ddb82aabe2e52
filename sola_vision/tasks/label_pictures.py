# SPDX-License-Identifier: Apache-2.0
"""Drawings of segmentations: class colours, overlays with a legend, label files, the worst images of an evaluation."""

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw

from sola_vision.colours import VERMILION
from sola_vision.data import IGNORED, LabelRule
from sola_vision.fonts import pillow_font, save_figure
from sola_vision.tasks.pictures import shortened

_GOLDEN = (math.sqrt(5) - 1) / 2
_NONE = (0, 0, 0)  # pixels without a class
_WRONG = ImageColor.getrgb(VERMILION)
_SHORTEST = 480  # smallest side of a drawn image in pixels, so that labels are readable
_LONGEST = 4096  # largest side after enlarging, for very elongated images
_NAMED = 24  # classes in the legend of the worst images


@dataclass(frozen=True)
class Example:
    """An image (None if unavailable), its true and predicted classes [H, W], and its pixel accuracy in percent."""

    name: str
    image: Image.Image | None
    truth: NDArray[np.integer]
    predicted: NDArray[np.integer]
    right: float


def class_colours(num_classes: int) -> NDArray[np.uint8]:
    """Return a colour for each class, [classes, 3]: distant hues for neighbours, three levels of lightness."""
    colours = [
        colorsys.hsv_to_rgb(
            (0.58 + index * _GOLDEN) % 1, (0.75, 0.5, 0.95)[index % 3], (0.95, 0.8, 0.65)[index // 3 % 3]
        )
        for index in range(num_classes)
    ]
    return (np.array(colours) * 255).round().astype(np.uint8)


def enlargement(image: Image.Image) -> int:
    """Return the integer factor by which a small image is enlarged for drawing."""
    return max(1, min(math.ceil(_SHORTEST / min(image.size)), _LONGEST // max(image.size)))


def paint(classes: NDArray[np.integer], num_classes: int) -> NDArray[np.uint8]:
    """Return classes [H, W] as colours [H, W, 3]; ignored pixels are black."""
    return np.vstack([class_colours(num_classes), [_NONE]]).astype(np.uint8)[classes]  # IGNORED is -1: the last row


def class_shares(classes: NDArray[np.integer]) -> list[tuple[int, float]]:
    """Return (class, share of all pixels) of the classes that occur in [H, W], largest first; ignored pixels count."""
    counts = np.bincount(classes[classes != IGNORED])
    order = np.argsort(-counts, kind="stable")
    return [(int(index), counts[index].item() / classes.size) for index in order if counts[index]]


def write_labels(path: Path, classes: NDArray[np.integer], rule: LabelRule) -> None:
    """Write a PNG of labels by the data's rule; 8-bit files get a palette, so that viewers show colours."""
    labels = rule.to_labels(classes)
    picture = Image.fromarray(labels)
    if labels.dtype == np.uint8:
        palette = np.zeros((256, 3), dtype=np.uint8)
        palette[rule.first : rule.first + rule.num_classes] = class_colours(rule.num_classes)
        picture.putpalette(palette.tobytes())
    picture.save(path)


def draw_overlay(
    image: Image.Image, classes: NDArray[np.integer], names: Sequence[str], opacity: float = 0.55
) -> Image.Image:
    """Return the image, enlarged if small, overlaid with class colours, and a legend of its classes, largest first."""
    factor = enlargement(image)
    image = image.convert("RGB").resize((factor * image.width, factor * image.height), Image.Resampling.BICUBIC)
    classes = classes.repeat(factor, 0).repeat(factor, 1)
    photograph = np.asarray(image, dtype=np.float32)
    colours = paint(classes, len(names))
    mixed = np.where((classes == IGNORED)[..., None], photograph, photograph * (1 - opacity) + colours * opacity)
    picture = Image.fromarray(mixed.round().astype(np.uint8))
    legend = _legend(
        [(names[i], share, class_colours(len(names))[i]) for i, share in class_shares(classes)], image.height
    )
    sheet = Image.new("RGB", (picture.width + legend.width, max(picture.height, legend.height)), "white")
    sheet.paste(picture, (0, 0))
    sheet.paste(legend, (picture.width, 0))
    return sheet


def _legend(rows: Sequence[tuple[str, float, NDArray[np.uint8]]], height: int) -> Image.Image:
    # the font stays readable; a small picture gets a taller sheet instead
    size = max(11, min(22, height // 24))
    texts = [f"{name}  {100 * share:.1f} %" for name, share, _ in rows]
    font = pillow_font("".join(texts), size)
    line, margin = round(1.5 * size), size // 2
    widths = [font.getlength(text) for text in texts] or [0]
    sheet = Image.new("RGB", (round(max(widths)) + line + 3 * margin, line * len(rows) + 2 * margin), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (text, (_, _, colour)) in enumerate(zip(texts, rows, strict=True)):
        top = margin + index * line
        draw.rectangle((margin, top, margin + size, top + size), fill=tuple(int(c) for c in colour))
        draw.text((margin + line, top - 1), text, fill="black", font=font)
    return sheet


def draw_worst(examples: Sequence[Example], names: Sequence[str], out: Path) -> None:
    """Draw a sheet with one row per image: the image, its truth, the prediction, and the wrong pixels.

    The classes that occur are named below, largest first.
    """
    parts = [part.ravel() for example in examples for part in (example.truth, example.predicted)]
    present = [index for index, _ in class_shares(np.concatenate(parts))] if parts else []
    colours = class_colours(len(names)) / 255
    patches = [Patch(color=tuple(colours[index]), label=shortened(names[index], 22)) for index in present[:_NAMED]]
    if len(present) > _NAMED:
        patches.append(Patch(color="none", label=f"and {len(present) - _NAMED} more"))
    columns = 5
    lines = 0.25 * math.ceil(len(patches) / columns)
    figure = Figure(figsize=(13, 2.7 * max(1, len(examples)) + lines), layout="constrained")
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=min(columns, len(patches)), fontsize=9)
    grid = figure.subplots(max(1, len(examples)), 4, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for row, example in zip(grid, examples, strict=False):
        wrong = (example.truth != IGNORED) & (example.truth != example.predicted)
        paints = paint(example.truth, len(names)), paint(example.predicted, len(names))
        photograph = Image.fromarray(paints[0]) if example.image is None else example.image
        shown = np.asarray(photograph.convert("L").convert("RGB"), dtype=np.uint8).copy()
        shown[wrong] = _WRONG
        pictures = (example.image, *paints, shown)
        titles = (example.name, "truth", "predicted", f"{example.right:.1f} % of the pixels correct")
        for axes, picture, title in zip(row, pictures, titles, strict=True):
            if picture is not None:
                axes.imshow(picture)
            axes.set_title(title, fontsize=8)
    save_figure(figure, out, dpi=100)
