# SPDX-License-Identifier: Apache-2.0
"""Draws a network from its configuration alone: layers as L and S tiles by stage, bridges as arcs above them.

    python docs/figures/architecture.py [tiny] [architecture.png]
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

import sola_vision
from sola_vision.colours import ORANGE, SKY

COLOURS = {"L": SKY, "S": ORANGE, "other": "#DDDDDD"}
TILE, GAP = 1.0, 0.14


def draw(config: sola_vision.SolaConfig, out: Path, title: str) -> None:
    schedule = config.parsed_schedule
    width = sum(schedule.depths) * (TILE + GAP) + (len(schedule.stages) + 2) * 1.75
    figure = Figure(figsize=(0.62 * width, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.axis("off")
    axes.set_aspect("equal")
    axes.set_title(title, loc="left", fontsize=12)

    def tile(x: float, text: str, colour: str, wide: float = TILE) -> None:
        box = FancyBboxPatch((x, 0), wide, TILE, boxstyle="round,pad=0.02,rounding_size=0.12", fc=colour, ec="#333333")
        axes.add_patch(box)
        axes.text(x + wide / 2, TILE / 2, text, ha="center", va="center", fontsize=9 if len(text) > 1 else 13)

    centre = {}
    tile(0, "image", "white", 1.3)
    x = 1.3 + GAP
    tile(x, f"stem\n{config.patch_size}x{config.patch_size}", COLOURS["other"], 1.2)
    x += 1.2 + GAP
    for index, (kinds, dim, stride) in enumerate(zip(schedule.stages, config.dims, config.strides, strict=True)):
        if index:
            tile(x, "merge", COLOURS["other"], 1.3)
            x += 1.3 + GAP
        start = x
        for number, kind in enumerate(kinds):
            tile(x, kind, COLOURS[kind])
            centre[index, number] = x + TILE / 2
            x += TILE + GAP
        middle = (start + x - GAP) / 2
        axes.plot((start, x - GAP), (-0.28, -0.28), color="#333333", linewidth=1)
        axes.text(middle, -0.45, f"stage {index + 1}\nH/{stride} x W/{stride}, {dim}", ha="center", va="top", fontsize=9)
    tile(x, "head", "white", 1.2)

    for bridge in config.parsed_bridges.bridges:
        a, b = centre[tuple(bridge.source)], centre[tuple(bridge.target)]
        arc = FancyArrowPatch(
            (a, TILE + 0.06), (b, TILE + 0.06), connectionstyle="arc3,rad=-0.32", arrowstyle="-|>", mutation_scale=12,
            color="#CC79A7", linewidth=1.6,
        )  # fmt: skip
        axes.add_patch(arc)
    top = TILE + 0.2 * max((centre[tuple(b.target)] - centre[tuple(b.source)] for b in config.parsed_bridges.bridges), default=1)
    axes.set_xlim(-0.2, x + 1.5)
    axes.set_ylim(-1.9, top + 0.2)
    axes.text(-0.1, -1.75, "L  linear attention (Bi-WKV)      S  softmax attention      arcs  Hidden State Bridges", fontsize=9)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else "tiny"
    target = Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent / "architecture.png"
    config = getattr(sola_vision, name)(bridges="paper")
    draw(config, target, f"sola_{name}   {config.schedule}   bridges {config.bridges}")
