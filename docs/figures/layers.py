# SPDX-License-Identifier: Apache-2.0
"""Draws what is inside of a linear layer, of a softmax layer and of a Hidden State Bridge, as `layers/` computes it.

    python docs/figures/layers.py [FOLDER]
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch

BLUE, ORANGE, PINK, GREY = "#B5DDF5", "#F6CF8B", "#E9BBD3", "#EEEEEE"
INK = "#333333"
HIGH, WIDE = 0.62, 1.5


@dataclass
class Picture:
    """Boxes on a grid of columns and rows, and the arrows between them."""

    title: str
    width: float
    rows: tuple[float, float]
    figure: Figure = field(init=False)
    axes: Axes = field(init=False)

    def __post_init__(self) -> None:
        low, high = self.rows
        self.figure = Figure(figsize=(0.82 * self.width, 0.82 * (high - low)), layout="constrained")
        self.axes = self.figure.subplots()
        self.axes.set(xlim=(-0.9, self.width - 0.9), ylim=(low, high), aspect="equal")
        self.axes.axis("off")
        self.axes.set_title(self.title, loc="left", fontsize=11)

    def box(self, x: float, y: float, text: str, colour: str = GREY, wide: float = WIDE) -> None:
        corner = (x - wide / 2, y - HIGH / 2)
        self.axes.add_patch(FancyBboxPatch(corner, wide, HIGH, boxstyle="round,pad=0,rounding_size=0.1", fc=colour, ec=INK))
        self.axes.text(x, y, text, ha="center", va="center", fontsize=9)

    def joint(self, x: float, y: float, sign: str) -> None:
        self.axes.add_patch(Circle((x, y), 0.2, fc="white", ec=INK))
        self.axes.text(x, y, sign, ha="center", va="center", fontsize=11)

    def arrow(self, *points: tuple[float, float], note: str = "", shift: tuple[float, float] = (0, 0.16)) -> None:
        for start, end in zip(points[:-2], points[1:-1], strict=True):
            self.axes.plot(*zip(start, end, strict=True), color=INK, linewidth=1.1, solid_capstyle="round")
        style = {"arrowstyle": "-|>", "color": INK, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
        self.axes.annotate("", points[-1], points[-2], arrowprops=style)
        if note:
            (x0, y0), (x1, y1) = points[-2:]
            self.axes.text((x0 + x1) / 2 + shift[0], (y0 + y1) / 2 + shift[1], note, ha="center", va="center", fontsize=9)

    def word(self, x: float, y: float, text: str) -> None:
        self.axes.text(x, y, text, ha="center", va="center", fontsize=10)

    def save(self, folder: Path, name: str) -> None:
        self.figure.savefig(folder / name, dpi=150)


def _shifted_start(p: Picture, x: float) -> float:
    """Norm and token shift from x on; returns where the next box is centred."""
    p.box(x + 1.0, 0, "norm", wide=1.0)
    p.box(x + 2.75, 0, "token shift", BLUE, 1.5)
    p.arrow((x + 1.5, 0), (x + 2.0, 0))
    return x + 4.7


def linear_layer(folder: Path) -> None:
    p = Picture("Linear layer (L)", 19.6, (-2.0, 2.3))
    p.word(-0.55, 0, "x")
    x = _shifted_start(p, 0.0)
    p.arrow((-0.35, 0), (0.5, 0))
    for y, name in ((1.0, "key k"), (0.0, "value v"), (-1.0, "receptance r")):
        p.box(x, y, name, BLUE)
        p.arrow((3.5, 0), (3.7, 0), (3.7, y), (x - WIDE / 2, y)) if y else p.arrow((3.5, 0), (x - WIDE / 2, 0))
    p.box(6.9, 0.5, "Bi-WKV\neq. 9", BLUE, 1.3)
    p.arrow((x + WIDE / 2, 1.0), (5.85, 1.0), (5.85, 0.62), (6.25, 0.62))
    p.arrow((x + WIDE / 2, 0.0), (5.85, 0.0), (5.85, 0.38), (6.25, 0.38))
    p.joint(8.4, 0, "×")
    p.arrow((7.55, 0.5), (8.4, 0.5), (8.4, 0.2))
    p.arrow((x + WIDE / 2, -1.0), (8.4, -1.0), (8.4, -0.2), note="sigmoid", shift=(-0.5, -0.12))
    p.axes.annotate("", (7.9, 1.75), (7.9, 0.5), arrowprops={"arrowstyle": "-|>", "color": "#B5477F", "linewidth": 1.3})
    p.axes.text(7.9, 1.95, "read-out, for bridges", ha="center", va="center", fontsize=9, color="#B5477F")
    p.box(9.6, 0, "output", BLUE, 1.1)
    p.arrow((8.6, 0), (9.05, 0))
    p.joint(10.6, 0, "+")
    p.arrow((10.15, 0), (10.4, 0))
    p.arrow((0.1, 0), (0.1, -1.55), (10.6, -1.55), (10.6, -0.2))

    p.box(11.75, 0, "norm, shift", BLUE, 1.3)
    p.arrow((10.8, 0), (11.1, 0))
    p.box(13.75, 0.6, "key, relu²", BLUE, 1.3)
    p.box(15.45, 0.6, "value", BLUE, 1.0)
    p.box(13.75, -0.6, "receptance", BLUE, 1.3)
    p.arrow((12.4, 0), (12.75, 0), (12.75, 0.6), (13.1, 0.6))
    p.arrow((12.4, 0), (12.75, 0), (12.75, -0.6), (13.1, -0.6))
    p.arrow((14.4, 0.6), (14.95, 0.6), note="4C")
    p.joint(16.6, 0, "×")
    p.arrow((15.95, 0.6), (16.6, 0.6), (16.6, 0.2))
    p.arrow((14.4, -0.6), (16.6, -0.6), (16.6, -0.2), note="sigmoid", shift=(-0.95, -0.55))
    p.joint(17.5, 0, "+")
    p.arrow((16.8, 0), (17.3, 0))
    p.arrow((10.95, 0), (10.95, -1.55), (17.5, -1.55), (17.5, -0.2))
    p.arrow((17.7, 0), (18.4, 0))
    p.save(folder, "linear_layer.png")


def softmax_layer(folder: Path) -> None:
    p = Picture("Softmax layer (S)", 17.4, (-1.9, 1.5))
    p.word(-0.55, 0, "x")
    p.box(1.0, 0, "norm", wide=1.0)
    p.arrow((-0.35, 0), (0.5, 0))
    for y, name in ((0.9, "query"), (0.0, "key"), (-0.9, "value")):
        p.box(3.0, y, name, ORANGE, 1.1)
        p.arrow((1.5, 0), (1.95, 0), (1.95, y), (2.45, y)) if y else p.arrow((1.5, 0), (2.45, 0))
    p.box(5.3, 0, "softmax attention\nall tokens, heads of 32", ORANGE, 2.3)
    for y in (0.9, 0.0, -0.9):
        p.arrow((3.55, y), (3.85, y), (3.85, y / 6), (4.15, y / 6))
    p.box(7.5, 0, "output", ORANGE, 1.1)
    p.arrow((6.45, 0), (6.95, 0))
    p.joint(8.6, 0, "+")
    p.arrow((8.05, 0), (8.4, 0))
    p.arrow((0.1, 0), (0.1, -1.45), (8.6, -1.45), (8.6, -0.2))
    p.box(9.9, 0, "norm", wide=1.0)
    p.arrow((8.8, 0), (9.4, 0))
    p.box(11.4, 0, "linear", ORANGE, 1.0)
    p.arrow((10.4, 0), (10.9, 0))
    p.box(13.1, 0, "3x3 depth-\nwise, GELU", ORANGE, 1.3)
    p.arrow((11.9, 0), (12.45, 0), note="4C")
    p.box(14.7, 0, "linear", ORANGE, 1.0)
    p.arrow((13.75, 0), (14.2, 0))
    p.joint(15.6, 0, "+")
    p.arrow((15.2, 0), (15.4, 0))
    p.arrow((9.05, 0), (9.05, -1.45), (15.6, -1.45), (15.6, -0.2))
    p.arrow((15.8, 0), (16.3, 0))
    p.save(folder, "softmax_layer.png")


def bridge(folder: Path) -> None:
    p = Picture("Hidden State Bridge", 12.6, (-1.9, 1.6))
    p.axes.text(0.0, 0.8, "read-out\n[B, H₁, W₁, C₁]", ha="center", va="center", fontsize=9, color="#B5477F")
    p.box(2.6, 0.8, "sample\nequidistant", PINK, 1.5)
    p.arrow((0.9, 0.8), (1.85, 0.8))
    p.box(5.1, 0.8, "projection", PINK, 1.4)
    p.arrow((3.35, 0.8), (4.4, 0.8), note="[B, H, W, C₁]", shift=(0, 0.5))
    p.joint(7.6, 0.8, "×")
    p.arrow((5.8, 0.8), (7.4, 0.8), note="[B, H, W, C]", shift=(0, 0.5))
    p.box(5.1, -0.4, "gate, sigmoid", PINK, 1.7)
    p.arrow((5.95, -0.4), (7.6, -0.4), (7.6, 0.6))
    p.word(0.0, -1.3, "x  [B, H, W, C]")
    p.arrow((1.1, -1.3), (2.6, -1.3), (2.6, -0.4), (4.25, -0.4))
    p.joint(8.8, -1.3, "+")
    p.arrow((1.1, -1.3), (8.6, -1.3))
    p.arrow((7.8, 0.8), (8.8, 0.8), (8.8, -1.1))
    p.box(10.6, -1.3, "softmax layer", ORANGE, 1.7)
    p.arrow((9.0, -1.3), (9.75, -1.3))
    p.save(folder, "bridge.png")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for draw in (linear_layer, softmax_layer, bridge):
        draw(target)
