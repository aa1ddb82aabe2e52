# SPDX-License-Identifier: Apache-2.0
"""Accuracy against cost: a study's arms with their standard errors, the paper's own numbers in a panel beside."""

from pathlib import Path

from matplotlib.figure import Figure

from sola_vision.analysis.labels import label_points

from .outcome import Outcome, Row

# Okabe and Ito's colours: told apart by colour-blind readers and in print
LINEAR, SOFTMAX, MIXED = "#0072B2", "#D55E00", "#009E73"


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


def _colour(row: Row) -> str:
    kinds = set(row.schedule.replace("/", ""))
    longest = max(row.schedule.split("/"), key=len)
    return LINEAR if kinds == {"L"} else SOFTMAX if set(longest) == {"S"} else MIXED
