# SPDX-License-Identifier: Apache-2.0
"""Accuracy against cost of the schedules that a search tried, with the budget and what was found."""

from pathlib import Path

from matplotlib.figure import Figure

from sola_vision.analysis.labels import label_points

from .costs import TOLERANCE, Costs
from .methods import Found


def draw_search(found: Found, costs: Costs, budget: float, out: Path) -> None:
    """Points tried, labelled by their schedules; accuracies are of different kinds of training in different methods."""
    scale, unit = (1e-6, "MMACs") if costs.unit == "MACs" else (1e3, "ms")
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(scale * budget * (1 - TOLERANCE), scale * budget * (1 + TOLERANCE), color="#E69F00", alpha=0.2)
    axes.axvline(scale * budget, color="#E69F00", label="budget, give or take 2 %")
    by_cost = {point.cost: point.top1 for point in sorted(found.points, key=lambda point: (point.cost, point.top1))}
    axes.plot([scale * cost for cost in by_cost], list(by_cost.values()), color="#999999", label="best at each cost")
    for point in found.points:
        best = (point.schedule, point.bridges) == (found.schedule, found.bridges)
        colour = "#D55E00" if best else "#0072B2"
        axes.plot(scale * point.cost, point.top1, color=colour, marker="*" if best else "o", linestyle="none")
    axes.set_xlabel(f"{unit} an image")
    axes.set_ylabel("top-1 on images held back from training, %")
    how = found.points[0].how if found.points else "nothing tried"
    axes.set_title(f"{found.method}: {found.schedule} {found.bridges} (accuracies: {how})", fontsize=9)
    axes.margins(x=0.2, y=0.15)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    names = [
        (costs.space.kinds(point.schedule, point.bridges), scale * point.cost, point.top1) for point in found.points
    ]
    label_points(figure, axes, names)
    figure.savefig(out, dpi=110)
