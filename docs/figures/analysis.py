# SPDX-License-Identifier: Apache-2.0
"""Draws interaction.png of docs/analysis.md: the theory of interaction ranges, exact beside approximated.

    python docs/figures/analysis.py
"""

from pathlib import Path

import numpy as np
from matplotlib import rcParams
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from sola_vision.analysis.interaction import (
    exact_radius,
    interaction_radius,
    lobe_error,
    per_token,
    raster_kernel,
    stacked_kernel,
)
from sola_vision.colours import BLUE, GREEN, PURPLE, VERMILION

TOLERANCE = 0.01
DEPTHS = np.arange(1, 33)


def main() -> None:
    rcParams["axes.titlesize"] = 10
    figure = Figure(figsize=(13, 7.4), layout="constrained")
    panels = figure.subplots(2, 4)
    growth(panels[0, 0])
    radius_errors(panels[0, 1])
    lobe_errors(panels[0, 2])
    profile(panels[0, 3])
    rasters(figure, panels[1])
    figure.savefig(Path(__file__).with_name("interaction.png"), dpi=90)


def growth(axes) -> None:
    exact = [exact_radius(stacked_kernel([0.2] * d), TOLERANCE) for d in DEPTHS]
    axes.plot(DEPTHS, exact, color=BLUE, marker="o", markersize=3, label="exact stack")
    axes.plot(DEPTHS, [interaction_radius([0.2] * d, TOLERANCE) for d in DEPTHS], color=VERMILION, label="eq. 17")
    axes.plot(DEPTHS, exact[0] * DEPTHS, color="0.5", linestyle=":", label="linear growth")
    axes.set_ylim(0, 1.15 * exact[-1])
    axes.set(xlabel="layers M", ylabel="radius, tokens", title="Radius at 1 %, w = 0.2 a token")
    axes.legend()


def radius_errors(axes) -> None:
    for decay, colour, mark in ((0.05, BLUE, "o"), (0.5, GREEN, "^"), (1.0, VERMILION, "s"), (2.0, PURPLE, "D")):
        exact = np.array([exact_radius(stacked_kernel([decay] * d), TOLERANCE) for d in DEPTHS])
        for lattice, line in ((True, "-"), (False, ":")):
            said = np.array([interaction_radius([decay] * d, TOLERANCE, lattice=lattice) for d in DEPTHS])
            label = f"w = {decay:g}" if lattice else None
            error = 100 * (said / exact - 1)
            axes.plot(DEPTHS, error, color=colour, linestyle=line, marker=mark, markersize=3, label=label)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(xlabel="layers M", ylabel="error, %", title="Radius of eq. 17 against exact\n(dotted: with 2 / w² of eq. 13)")
    axes.legend()


def lobe_errors(axes) -> None:
    for decay, colour, mark in ((0.05, BLUE, "o"), (0.5, GREEN, "^"), (1.0, VERMILION, "s"), (2.0, PURPLE, "D")):
        errors = [100 * lobe_error([decay] * d) for d in DEPTHS]
        axes.plot(DEPTHS, errors, color=colour, marker=mark, markersize=3, label=f"w = {decay:g}")
    axes.axvline(5, color="0.6", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
    axes.minorticks_off()
    axes.set(xlabel="layers M", ylabel="largest error, %", title="Gaussian within one sigma\n(line: 5 layers)")
    axes.legend()


def profile(axes) -> None:
    for depth, colour in ((1, BLUE), (2, GREEN), (5, VERMILION)):
        kernel = stacked_kernel([0.2] * depth)
        middle, sigma = len(kernel) // 2, np.sqrt(depth * 0.5 / np.sinh(0.1) ** 2)
        offset = np.arange(0, int(4 * sigma) + 1)
        axes.plot(offset / sigma, kernel[middle + offset] / kernel[middle], color=colour, label=f"M = {depth}")
    at = np.linspace(0, 4, 100)
    axes.plot(at, np.exp(-(at**2) / 2), color="black", linestyle="--", label="Gaussian")
    axes.set_yscale("log")
    axes.set_ylim(1e-4, 1.3)
    axes.set(xlabel="distance / sigma", ylabel="kernel / its centre", title="The tails stay exponential")
    axes.legend()


def rasters(figure, panels) -> None:
    side = 56
    cases = ((64.0, 1), (16.0, 1), (64.0, 9), (16.0, 9))
    for axes, (decay, depth) in zip(panels, cases, strict=True):
        read = raster_kernel([per_token(decay, side * side)] * depth, side, side, side // 2, side // 2)
        drawn = axes.imshow(read * read.size, norm=LogNorm(1e-2, 1e2), cmap="cividis")
        axes.set_xticks([])
        axes.set_yticks([])
        layers = "1 layer" if depth == 1 else f"{depth} layers"
        axes.set_title(f"56 x 56 tokens, eq. 9 with w = {decay:g}, {layers}", fontsize=9)
    figure.colorbar(drawn, ax=panels, label="times the uniform weight", shrink=0.85)


if __name__ == "__main__":
    main()
