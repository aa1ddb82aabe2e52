# SPDX-License-Identifier: Apache-2.0
"""The figure of a search: accuracy against cost of every schedule evaluated, the budget and the result."""

import itertools
from pathlib import Path

from matplotlib.figure import Figure

from sola_vision.analysis.labels import label_points
from sola_vision.colours import BLUE, GREEN, ORANGE, VERMILION

from .costs import TOLERANCE, Costs
from .methods import Found


def draw_search(found: Found, costs: Costs, budget: float, out: Path) -> None:
    """Plot accuracy against cost, with points labelled by their letters and coloured by how they were trained."""
    scale, unit = (1e-6, "MMACs") if costs.unit == "MACs" else (1e3, "ms")
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(scale * budget * (1 - TOLERANCE), scale * budget * (1 + TOLERANCE), color=ORANGE, alpha=0.2)
    axes.axvline(scale * budget, color=ORANGE, label="budget ± 2 %")
    kinds = list(dict.fromkeys(point.how for point in found.points))
    for how, colour in zip(kinds, (BLUE, GREEN), strict=False):
        points = sorted((p for p in found.points if p.how == how), key=lambda point: (point.cost, point.top1))
        axes.plot(
            [scale * p.cost for p in points], [p.top1 for p in points], color=colour, marker="o", ls="none", label=how
        )
        tops = list(itertools.accumulate((point.top1 for point in points), max))  # best accuracy up to each cost
        axes.step([scale * p.cost for p in points], tops, where="post", color=colour, alpha=0.4)
    chosen = [p for p in found.points if (p.schedule, p.bridges) == (found.schedule, found.bridges)][-1:]
    for point in chosen:
        axes.plot(
            scale * point.cost, point.top1, color=VERMILION, marker="*", markersize=12, ls="none", label="selected"
        )
    axes.set_xlabel(f"{unit} per image")
    axes.set_ylabel("top-1 on the validation split of the training images, %")
    axes.set_title(f"{found.method}: {costs.space.text(costs.space.kinds(found.schedule, found.bridges))}", fontsize=9)
    axes.margins(x=0.2, y=0.15)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    names = [
        (costs.space.kinds(point.schedule, point.bridges), scale * point.cost, point.top1) for point in found.points
    ]
    label_points(figure, axes, names)
    figure.savefig(out, dpi=110)
