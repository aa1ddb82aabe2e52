# SPDX-License-Identifier: Apache-2.0
"""The contact sheet of `sola explain`: a row per layer, a column per kind of map, each with title and colour bar."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sola_vision.analysis.explain import LayerView
from sola_vision.analysis.trace import Patch
from sola_vision.fonts import save_figure

# readable for the colour-blind: a ramp of rising lightness, and two hues diverging from zero
_RISING, _TWO_SIDED = "cividis", "PuOr_r"
_READS = (1e-2, 1e2)  # times the uniform weight; the same scale for all layers makes them comparable
_DPI = 100
_PANEL, _BAR, _GAP, _TITLE = 1.75, 0.08, 0.55, 0.24  # inches
_LEFT, _TOP = 0.15, 2.9


@dataclass(frozen=True)
class _Panel:
    title: str
    values: NDArray[np.float64]
    norm: Normalize
    colours: str
    patch: Patch
    mark: tuple[float, float] | None = None  # (y, x) in pixels of the image


def draw_sheet(
    image: NDArray[np.uint8],
    point: tuple[float, float],
    columns: Sequence[tuple[str, Sequence[LayerView]]],
    out: Path,
    title: str,
) -> None:
    """Draw the views of one network, or of two side by side, below the image [H, W, 3] with its point (y, x).

    columns: (label, views) of each network. With two, single channels and heads are omitted.
    """
    alone = len(columns) == 1
    height, width = image.shape[:2]
    rows = [
        [panel for _, views in columns for panel in _panels(views, number, alone, (height, width))]
        for number in range(_depth(columns))
    ]
    panel_height = min(max(_PANEL * height / width, 0.5 * _PANEL), 1.6 * _PANEL)
    across = max(len(row) for row in rows)
    row_height = panel_height + _TITLE + 0.12
    figure_size = (_LEFT + across * (_PANEL + _BAR + _GAP) + 0.1, _TOP + len(rows) * row_height + 0.1)
    figure = Figure(figsize=figure_size)
    _head(figure, figure_size, image, point, columns, title)
    for r, row in enumerate(rows):
        for c, panel in enumerate(row):
            left = _LEFT + c * (_PANEL + _BAR + _GAP)
            bottom = figure_size[1] - _TOP - (r + 1) * row_height + 0.06
            _draw(figure, figure_size, (left, bottom, _PANEL, panel_height), panel, (height, width))
    save_figure(figure, out, dpi=_DPI)


def _depth(columns: Sequence[tuple[str, Sequence[LayerView]]]) -> int:
    return max(len(views) for _, views in columns)


def _panels(views: Sequence[LayerView], number: int, alone: bool, image: tuple[int, int]) -> list[_Panel]:
    if number >= len(views):
        return []
    view = views[number]
    reach = max(float(np.abs(view.eigencam).max()), 1e-12)
    low, high = float(view.activation.min()), float(view.activation.max())
    panels = [
        _Panel(
            f"{view.name}  activation", view.activation, Normalize(low, max(high, low + 1e-12)), _RISING, view.patch
        ),
        _Panel(f"{view.name}  EigenCAM", view.eigencam, TwoSlopeNorm(0, -reach, reach), _TWO_SIDED, view.patch),
    ]
    if view.reads is not None:
        mark = view.middle(image)
        kind = "WKV, mean of channels" if view.name.endswith("L") else "attention, mean of heads"
        panels.append(_reads(f"{view.name}  {kind}", view.reads, view.patch, mark))
        if alone:
            panels += [_reads(name, one, view.patch, mark) for name, one in view.examples.items()]
    if alone:
        panels += [
            _Panel(f"gate of {name}", gate, Normalize(0, 1), _RISING, view.patch) for name, gate in view.gates.items()
        ]
    return panels


def _reads(title: str, weights: NDArray[np.float64], patch: Patch, mark: tuple[float, float]) -> _Panel:
    times_uniform = np.clip(weights * weights.size, *_READS)
    return _Panel(title, times_uniform, LogNorm(*_READS), _RISING, patch, mark)


def _head(
    figure: Figure,
    size: tuple[float, float],
    image: NDArray[np.uint8],
    point: tuple[float, float],
    columns: Sequence[tuple[str, Sequence[LayerView]]],
    title: str,
) -> None:
    height, width = image.shape[:2]
    tall = min(_TOP - 0.35, 4.6 * height / width)
    wide = tall * width / height
    axes = figure.add_axes((_LEFT / size[0], 1 - (tall + 0.12) / size[1], wide / size[0], tall / size[1]))
    axes.imshow(image, extent=(0, width, height, 0))
    axes.set_axis_off()
    _mark(axes, point[1], point[0], 11)
    notes = [
        "activation: root mean square over channels of the layer's output",
        "EigenCAM: first principal component; orange where features are strong, purple below their mean",
        "WKV, attention: the weights with which the token at the point reads, relative to uniform weights;",
        "all on one scale, from 0.01 to 100. Channels are named by their decay w.",
        "gate: the gate of a bridge, mean of channels",
    ]
    if len(columns) > 1:
        labels = " | ".join(label for label, _ in columns)
        notes = [f"left to right: {labels}", *notes[:4]]
    left = _LEFT + wide + 0.25
    figure.text(left / size[0], 1 - 0.2 / size[1], title, fontsize=13, weight="bold", va="top")
    figure.text(
        left / size[0],
        1 - (0.36 + 0.24 * (1 + title.count("\n"))) / size[1],
        "\n".join(notes),
        fontsize=9.5,
        va="top",
        linespacing=1.5,
    )


def _draw(
    figure: Figure,
    size: tuple[float, float],
    box: tuple[float, float, float, float],
    panel: _Panel,
    image: tuple[int, int],
) -> None:
    left, bottom, width, height = box
    axes = figure.add_axes((left / size[0], bottom / size[1], width / size[0], height / size[1]))
    # align tokens with their pixels; parts beyond the image are cut off
    extent = (0, panel.values.shape[1] * panel.patch[1], panel.values.shape[0] * panel.patch[0], 0)
    drawn = axes.imshow(
        panel.values, cmap=panel.colours, norm=panel.norm, interpolation="nearest", aspect="auto", extent=extent
    )
    axes.set_xlim(0, image[1])
    axes.set_ylim(image[0], 0)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(panel.title, fontsize=8, pad=3, loc="left")
    if panel.mark is not None:
        _mark(axes, panel.mark[1], panel.mark[0], 7)
    bar = figure.add_axes(((left + width + 0.05) / size[0], bottom / size[1], _BAR / size[0], height / size[1]))
    ticks, labels = _ticks(panel.norm)
    colour_bar = figure.colorbar(drawn, cax=bar, ticks=ticks)
    colour_bar.ax.set_yticklabels(labels)
    colour_bar.ax.minorticks_off()
    colour_bar.ax.tick_params(labelsize=7, length=2, pad=1)


def _ticks(norm: Normalize) -> tuple[list[float], list[str]]:
    low, high = float(norm.vmin or 0), float(norm.vmax or 0)
    if isinstance(norm, LogNorm):
        ticks = [low, 1.0, high]
    elif isinstance(norm, TwoSlopeNorm):
        ticks = [low, 0.0, high]
    else:
        ticks = [low, high]
    return ticks, [f"{tick:.3g}" for tick in ticks]


def _mark(axes: Axes, x: float, y: float, size: float) -> None:
    """Draw a ring that is visible on light and dark backgrounds."""
    both: dict[str, Any] = {"marker": "o", "markersize": size, "markerfacecolor": "none", "clip_on": False}
    axes.plot([x], [y], markeredgecolor="black", markeredgewidth=3, **both)
    axes.plot([x], [y], markeredgecolor="white", markeredgewidth=1.3, **both)
