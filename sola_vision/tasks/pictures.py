# SPDX-License-Identifier: Apache-2.0
"""Figures of runs and evaluations: learning curve, confusion matrix, correct and wrong predictions."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from sola_vision.colours import BLUE, VERMILION
from sola_vision.engine.log import read_records
from sola_vision.fonts import save_figure

_NAMES = 40  # maximum number of class names along a side of a confusion matrix
_FEW = 30  # curves with up to this many points get markers; a single point would be invisible otherwise


def draw_learning_curve(metrics: Path, out: Path, metric: str) -> None:
    """Draw the training loss and the metric of the held-out set over epochs, from a run's metrics.jsonl."""
    records = read_records(metrics)
    losses = [(r["epoch"], r["loss"]) for r in records if r["kind"] == "train" and r.get("loss") is not None]
    scores = [(r["epoch"], r[metric]) for r in records if r["kind"] == "eval" and r.get(metric) is not None]
    figure = Figure(figsize=(7, 4), layout="constrained")
    left = figure.subplots()
    if losses:
        left.plot(*zip(*losses, strict=True), color=BLUE, marker="o" if len(losses) <= _FEW else None, markersize=3)
    left.set_xlabel("epoch")
    left.set_ylabel("training loss", color=BLUE)
    left.set_ylim(bottom=0)
    if scores:
        right = left.twinx()
        right.plot(*zip(*scores, strict=True), color=VERMILION, marker="o", markersize=3)
        low, high = right.get_ylim()
        right.set_ylim(max(low, 0.0), min(high, 100.5))  # room for a marker at 100 %
        right.set_ylabel(f"{metric} on the held-out images, %", color=VERMILION)
        best = max(score for _, score in scores)
        right.set_title(f"best {metric} {best:.2f}", loc="right", fontsize=10)
    # start at epoch 0, or the axis of a short run would only span tenths of an epoch
    left.set_xlim(0, 1.03 * max((epoch for epoch, _ in losses + scores), default=1))
    save_figure(figure, out, dpi=120)


def draw_confusion(confusion: Tensor, classes: Sequence[str], out: Path) -> None:
    """Draw true classes as rows and predicted classes as columns, each row normalised to 1; with counts if they fit.

    With many classes only every second, third, ... is named.
    """
    counts = confusion.double().numpy()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    number = len(classes)
    side = min(14.0, 3.5 + 0.32 * number)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    step = math.ceil(number / _NAMES)
    names = [shortened(name) for name in classes[::step]]
    axes.set_xticks(range(0, number, step), names, rotation=90)
    axes.set_yticks(range(0, number, step), names)
    if number <= 20:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{counts[row, column]:.0f}", ha="center", va="center", color=colour, fontsize=7)
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    save_figure(figure, out, dpi=120)


def shortened(name: str, letters: int = 28) -> str:
    """Return a class name cut to `letters` characters and escaped for matplotlib."""
    name = name if len(name) <= letters else f"{name[: letters - 1]}\N{HORIZONTAL ELLIPSIS}"
    return name.replace("$", r"\$")  # dollars would enclose a formula


def draw_predictions(examples: Sequence[tuple[Image.Image, str, str, float]], out: Path, title: str) -> None:
    """Draw a sheet of (picture, true class, predicted class, confidence); wrong predictions are framed."""
    columns = min(8, max(1, len(examples)))
    rows = math.ceil(len(examples) / columns)
    figure = Figure(figsize=(1.75 * columns, 2.1 * rows + 0.5), layout="constrained")
    figure.suptitle(title)
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.axis("off")
    for axes, (picture, true, predicted, confidence) in zip(figure.axes, examples, strict=False):
        right = true == predicted
        axes.imshow(picture, interpolation="nearest" if max(picture.size) <= 64 else "antialiased")
        answer = f"{predicted} {100 * confidence:.0f} %"
        text = answer if right else f"{answer}\nis {true}"
        axes.set_title(text, fontsize=8, color="black" if right else VERMILION)
        if not right:
            width, height = picture.size
            axes.add_patch(_frame(width, height))
    save_figure(figure, out, dpi=120)


def _frame(width: int, height: int) -> Rectangle:
    return Rectangle((-0.5, -0.5), width, height, fill=False, edgecolor=VERMILION, linewidth=3)
