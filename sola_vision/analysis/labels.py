# SPDX-License-Identifier: Apache-2.0
"""Names beside the points of a plot, so that they can be read."""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

# of a name's nearer end and middle from its point, in points, the nearest first
_PLACES = sorted(
    ((side * (5 + right), up) for side in (1, -1) for right in range(0, 80, 12) for up in range(-80, 84, 8)),
    key=lambda place: math.hypot(*place),
)


def label_points(figure: Figure, axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Names beside the points of a figure that is complete but for them: each at the nearest place around its point
    where the fewest points, earlier names and edges are in the way, with a line between the two.
    """
    if not points:
        return
    figure.draw_without_rendering()  # places are pixels, and the layout has to be settled
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
        boxes = [  # a name to the left ends at its place
            Bbox.from_bounds(
                across + pixels_a_point * right - width * (right < 0),
                up + pixels_a_point * above - height / 2,
                width,
                height,
            )
            for right, above in _PLACES
        ]
        in_the_way = [
            box.count_overlaps(taken) + len(taken) * (not (panel.contains(*box.min) and panel.contains(*box.max)))
            for box in boxes
        ]
        best = in_the_way.index(min(in_the_way))  # the first of equal ones: places are sorted by distance
        taken.append(boxes[best])
        side = "right" if _PLACES[best][0] < 0 else "left"
        label.set(position=_PLACES[best], horizontalalignment=side, verticalalignment="center")
