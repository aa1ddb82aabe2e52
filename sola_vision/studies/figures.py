# SPDX-License-Identifier: Apache-2.0
"""The figure of a study: accuracy against cost with standard errors, and the paper's numbers or accuracy over depth."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sola_vision.analysis.labels import label_points
from sola_vision.colours import BLUE, GREEN, VERMILION
from sola_vision.fonts import save_figure
from sola_vision.wording import amount

from .outcome import Outcome, Row

LINEAR, SOFTMAX, MIXED = BLUE, VERMILION, GREEN
_DPI = 100  # of the file
_LAYOUT_DPI = 110  # in which labels are placed; their offsets are in points, which suit the file too


def draw_study(outcome: Outcome, out: Path) -> None:
    """Draw the metric over MACs, with a second panel for the paper's numbers, if any.

    A study over depth has a panel over the number of layers instead, like Figure 5.
    """
    done = [row for row in outcome.rows if row.mean is not None]
    over_depth = outcome.study.over == "depth"
    with_paper = [] if over_depth else [row for row in outcome.rows if row.paper is not None]
    two = over_depth or bool(with_paper)
    figure = Figure(figsize=(11.5 if two else 6.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2 if two else 1, squeeze=False)[0]
    costs = panels[1 if over_depth else 0]
    _draw_costs(outcome, done, costs)
    if over_depth:
        _draw_depths(done, panels[0])
        panels[0].set_ylabel(f"{outcome.study.measure}, %")
    if with_paper:
        for row in with_paper:
            panels[1].plot(row.macs / 1e6, row.paper, color=_colour(row), marker="s", linestyle="none")
        panels[1].set_xlabel(f"MMACs of the network here, per image of {outcome.plan['cost_size']} pixels")
        panels[1].set_title(f"the paper's {outcome.study.measure} ({outcome.study.data})", fontsize=9)
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.margins(x=0.15, y=0.1)
    figure.set_dpi(_LAYOUT_DPI)
    label_points(figure, costs, [(row.name, row.macs / 1e6, row.mean or 0.0) for row in done])
    if with_paper:
        label_points(figure, panels[1], [(row.name, row.macs / 1e6, row.paper or 0.0) for row in with_paper])
    save_figure(figure, out, dpi=_DPI)


def _draw_costs(outcome: Outcome, done: Sequence[Row], axes: Axes) -> None:
    for row in done:
        axes.errorbar(
            row.macs / 1e6, row.mean or 0.0, yerr=row.error, color=_colour(row), marker="o", capsize=3, linestyle="none"
        )
    axes.set_xlabel(f"MMACs per image of {outcome.plan['cost_size']} pixels")
    axes.set_ylabel(f"{outcome.study.measure}, %")
    seeds = max((len(row.by_seed) for row in done), default=0)
    axes.set_title(
        f"here: {outcome.plan['data']['name']}, up to {amount(seeds, 'seed')}, bars are standard errors", fontsize=9
    )
    shown = {_colour(row) for row in done}
    for colour, text in ((LINEAR, "linear only"), (MIXED, "both kinds"), (SOFTMAX, "softmax only in what varies")):
        if colour in shown:
            axes.plot([], [], color=colour, marker="o", linestyle="none", label=text)
    if shown:
        _legend_below(axes)


def _legend_below(axes: Axes) -> None:
    """Place the legend where it covers no point; "best" is slow for many points, and warns about it."""
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)


def _draw_depths(done: Sequence[Row], axes: Axes) -> None:
    """Draw accuracy over the number K of layers: a line for stacks that end in L, and one for those that end in S."""
    for kind, colour, text in (("L", LINEAR, "K x L"), ("S", MIXED, "(K - 1) x L + S")):
        rows = sorted((row for row in done if row.schedule.endswith(kind)), key=lambda row: len(row.schedule))
        if rows:
            axes.errorbar(
                [len(row.schedule) for row in rows],
                [row.mean or 0.0 for row in rows],
                yerr=[row.error for row in rows],
                color=colour,
                marker="o",
                capsize=3,
                label=text,
            )
            _legend_below(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("K, layers")
    axes.set_title("accuracy over depth, as in the paper's Figure 5", fontsize=9)


def _colour(row: Row) -> str:
    kinds = set(row.schedule.replace("/", ""))
    longest = max(row.schedule.split("/"), key=len)
    return LINEAR if kinds == {"L"} else SOFTMAX if set(longest) == {"S"} else MIXED
