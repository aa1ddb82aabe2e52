# SPDX-License-Identifier: Apache-2.0
"""Accuracy against cost: a study's arms with their standard errors, the paper's own numbers in a panel beside."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from .outcome import Outcome, Row

# Okabe and Ito's colours: told apart by colour-blind readers and in print
LINEAR, SOFTMAX, MIXED = "#0072B2", "#D55E00", "#009E73"
# of a name's nearer end and middle from its point, in points, the nearest first
_PLACES = sorted(
    ((side * (5 + right), up) for side in (1, -1) for right in range(0, 80, 12) for up in range(-80, 84, 8)),
    key=lambda place: math.hypot(*place),
)


def draw_study(outcome: Outcome, out: Path) -> None:
    """The metric over MACs; the second panel is there when the paper has numbers."""
    with_paper = [row for row in outcome.rows if row.paper is not None]
    figure = Figure(figsize=(11.5 if with_paper else 6.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2 if with_paper else 1, squeeze=False)[0]
    plan = outcome.plan
    done = [row for row in outcome.rows if row.mean is not None]
    for row in done:
        panels[0].errorbar(
            row.macs / 1e6, row.mean, yerr=row.error, color=_colour(row), marker="o", capsize=3, linestyle="none"
        )
    panels[0].set_xlabel(f"MMACs an image of {plan['cost_size']} pixels")
    panels[0].set_ylabel(f"{outcome.study.measure}, %")
    seeds = max((len(row.by_seed) for row in done), default=0)
    panels[0].set_title(f"here: {plan['data']['name']}, up to {seeds} seeds, bars are standard errors", fontsize=9)
    if with_paper:
        for row in with_paper:
            panels[1].plot(row.macs / 1e6, row.paper, color=_colour(row), marker="s", linestyle="none")
        panels[1].set_xlabel(f"MMACs of the network here, an image of {plan['cost_size']} pixels")
        panels[1].set_title(f"the paper's {outcome.study.measure} ({outcome.study.data})", fontsize=9)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.margins(x=0.15, y=0.1)
    shown = {_colour(row) for row in done}
    for colour, text in ((LINEAR, "linear only"), (MIXED, "both kinds"), (SOFTMAX, "softmax only in what varies")):
        if colour in shown:
            panels[0].plot([], [], color=colour, marker="o", linestyle="none", label=text)
    if shown:
        panels[0].legend(fontsize=8, loc="lower right")  # "best" takes seconds on a busy machine, and warns then
    figure.set_dpi(110)
    label_points(figure, panels[0], [(row.name, row.macs / 1e6, row.mean or 0.0) for row in done])
    if with_paper:
        label_points(figure, panels[1], [(row.name, row.macs / 1e6, row.paper or 0.0) for row in with_paper])
    figure.savefig(out)


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


def _colour(row: Row) -> str:
    kinds = set(row.schedule.replace("/", ""))
    longest = max(row.schedule.split("/"), key=len)
    return LINEAR if kinds == {"L"} else SOFTMAX if set(longest) == {"S"} else MIXED
