# SPDX-License-Identifier: Apache-2.0
"""Labels for the points of a plot, placed so that they do not overlap."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from sola_vision.fonts import fonts_for

# candidate offsets (points) of a label's near edge and vertical middle from its point, nearest first
_OFFSETS = sorted(
    ((side * (5 + right), up) for side in (1, -1) for right in range(0, 80, 12) for up in range(-80, 84, 8)),
    key=lambda offset: math.hypot(*offset),
)


def label_points(figure: Figure, axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Label `points` (name, x, y) in `axes` of an otherwise complete figure, with a line from label to point.

    Each label is placed at the nearest candidate offset that overlaps the fewest points, earlier labels and edges.
    """
    if not points:
        return
    with fonts_for(figure):
        figure.draw_without_rendering()  # offsets are in pixels, which need the final layout
    pixels_a_point = figure.dpi / 72
    panel = axes.get_window_extent()
    centres = axes.transData.transform([(x, y) for _, x, y in points])
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in centres]
    legend = axes.get_legend()
    taken += [] if legend is None else [legend.get_window_extent()]
    line = {"arrowstyle": "-", "linewidth": 0.5, "color": "gray", "shrinkA": 0, "shrinkB": 2}
    for (name, x, y), (across, up) in zip(points, centres, strict=True):
        label = axes.annotate(name, (x, y), (0, 0), textcoords="offset points", fontsize=7, arrowprops=line)
        width, height = label.get_window_extent().size
        boxes = [  # a label on the left ends at its offset
            Bbox.from_bounds(
                across + pixels_a_point * right - width * (right < 0),
                up + pixels_a_point * above - height / 2,
                width,
                height,
            )
            for right, above in _OFFSETS
        ]
        overlaps = [
            box.count_overlaps(taken) + len(taken) * (not (panel.contains(*box.min) and panel.contains(*box.max)))
            for box in boxes
        ]
        best = overlaps.index(min(overlaps))  # the nearest of equally good ones, since offsets are sorted by distance
        taken.append(boxes[best])
        side = "right" if _OFFSETS[best][0] < 0 else "left"
        label.set(position=_OFFSETS[best], horizontalalignment=side, verticalalignment="center")
