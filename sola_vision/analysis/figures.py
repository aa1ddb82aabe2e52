# SPDX-License-Identifier: Apache-2.0
"""Figures of cost over image size and of receptive fields over depth."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from sola_vision.analysis.cost import Cost
from sola_vision.analysis.receptive import FieldMap, field_statistics
from sola_vision.analysis.scaling import Point
from sola_vision.colours import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION
from sola_vision.fonts import save_figure

COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)  # each with its own marker
MARKS = ("o", "s", "^", "D", "v", "P", "X")


def draw_scaling(points: Sequence[Point], out: Path) -> None:
    """Draw Figure 1(b), MACs over the side of the image, with panels for time and memory if they were measured."""
    with_time = any(point.seconds is not None for point in points)
    figure = Figure(figsize=(15 if with_time else 6.4, 4.6), layout="constrained")
    panels = figure.subplots(1, 3 if with_time else 1, squeeze=False)[0]
    quantities = [("gmacs", "GMACs"), ("seconds", "seconds per image"), ("mebibytes", "MiB above the idle process")]
    for axes, (field, label) in zip(panels, quantities, strict=False):
        for number, network in enumerate(dict.fromkeys(point.network for point in points)):
            pairs = [
                (p.size, value)
                for p in points
                if p.network == network and (value := getattr(p, field)) is not None and value > 0
            ]
            if pairs:
                axes.plot(*zip(*pairs, strict=True), label=network, **style(number), markersize=4.5)
        axes.set_xlabel("side of the square image, pixels (patch size 4)")
        axes.set_ylabel(label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        sizes = [s for s in (16, 32, 64, 128, 256, 512, 1280) if s <= max(p.size for p in points)]
        axes.set_xticks(sizes, [str(s) for s in sizes], minor=False)
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, out, dpi=110)


def draw_costs(costs: Sequence[Cost], out: Path) -> None:
    """Draw MACs and activation memory of each network over the number of pixels, or as bars for a single size."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    names = list(dict.fromkeys(cost.model for cost in costs))
    quantities = (
        ("GMACs", lambda c: c.gmacs),
        ("inference, MiB of activations", lambda c: c.peak_bytes / 2**20),
        ("training, MiB of activations", lambda c: c.saved_bytes / 2**20),
    )
    for axes, (label, value) in zip(figure.subplots(1, 3), quantities, strict=True):
        if len({(c.height, c.width) for c in costs}) == 1:
            axes.barh(range(len(costs)), [value(c) for c in costs], color=COLOURS[0])
            axes.set_yticks(
                range(len(costs)), [c.model for c in costs] if axes is figure.axes[0] else [""] * len(costs)
            )
            axes.invert_yaxis()
            axes.set_xlabel(f"{label} at {costs[0].height}x{costs[0].width}")
        else:
            for number, name in enumerate(names):
                pairs = sorted((c.height * c.width, value(c)) for c in costs if c.model == name)
                axes.plot(*zip(*pairs, strict=True), label=name, **style(number))
            axes.set_ylabel(label)
            axes.set_xscale("log")
            axes.set_yscale("log")
            square = all(c.height == c.width for c in costs)
            axes.set_xlabel("side of the square image, pixels" if square else "size of the image (HxW), pixels")
            sizes: dict[int, dict[str, None]] = {}  # sizes of equal area share a tick
            for c in costs:
                sizes.setdefault(c.height * c.width, {})[str(c.height) if square else f"{c.height}x{c.width}"] = None
            labels = ["\n".join(names) for names in sizes.values()]
            axes.set_xticks(list(sizes), labels, fontsize=8, rotation=0 if square and len(sizes) < 6 else 90)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(alpha=0.3)
    if figure.axes[0].get_legend_handles_labels()[0]:
        figure.axes[0].legend(fontsize=8)
    save_figure(figure, out, dpi=110)


def style(number: int) -> dict[str, str]:
    """Return colour and marker of the n-th line."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKS[number % len(MARKS)]}


def draw_fields(networks: Sequence[tuple[str, dict[str, FieldMap]]], out: Path) -> None:
    """Draw receptive fields, a row per network and a column per layer, and below their size over depth."""
    layers = list(networks[0][1])
    # at most 12 columns, which stay large enough to read
    shown = layers if len(layers) <= 12 else [layers[round(i * (len(layers) - 1) / 11)] for i in range(12)]
    figure = Figure(figsize=(1.25 * len(shown) + 0.4, 1.55 * len(networks) + 4.0), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.55 * len(networks), 3.8])
    top, bottom = parts
    panels = top.subplots(len(networks), len(shown), squeeze=False)
    for (label, fields), row in zip(networks, panels, strict=True):
        names = list(fields)
        for name, axes in zip(shown, row, strict=True):
            name = name if name in fields else names[min(layers.index(name), len(names) - 1)]
            field = fields[name].map / fields[name].map.max()
            axes.imshow(field.clip(1e-4), norm=LogNorm(1e-4, 1), cmap="cividis")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.set_title(name, fontsize=8)
        text = row[0].text(0, -0.06, label, transform=row[0].transAxes, fontsize=8, va="top")
        text.set_in_layout(False)  # the label may extend below the other panels of the row
    colours = figure.axes[0].images[0]
    top.colorbar(colours, ax=panels, label="relative to the maximum", shrink=0.8, pad=0.01)
    for axes, (title, value) in zip(
        bottom.subplots(1, 2),
        (
            ("% of the image that contains 90 % of the field", lambda s: 100 * s.areas[0.9]),
            ("rms distance, pixels (solid: up/down, dashed: left/right)", None),
        ),
        strict=True,
    ):
        for number, (label, fields) in enumerate(networks):
            numbers = [field_statistics(field) for field in fields.values()]
            depth = range(1, len(numbers) + 1)
            if value is not None:
                axes.plot(depth, [value(n) for n in numbers], label=label, **style(number))
            else:
                axes.plot(depth, [n.rows for n in numbers], label=label, **style(number))
                axes.plot(depth, [n.columns for n in numbers], linestyle="--", **style(number))
        axes.set_xticks(range(1, len(layers) + 1), layers, fontsize=7, rotation=90 if len(layers) > 12 else 0)
        axes.set_ylim(bottom=0)
        axes.set_title(title, fontsize=9)
        axes.grid(alpha=0.3)
    bottom.legend(*bottom.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    save_figure(figure, out, dpi=100)
