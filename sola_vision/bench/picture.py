# SPDX-License-Identifier: Apache-2.0
"""Plot of time and memory against resolution, from the rows of `network.measure`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sola_vision.analysis.figures import style
from sola_vision.fonts import save_figure

_CONDITION = ("dtype", "layout", "compiled")


def draw(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Plot seconds and MiB per image against the square root of its pixels, one line per network and condition."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    # conditions that all rows share are omitted
    varied = [name for name in _CONDITION if len({row[name] for row in rows}) > 1]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        words = [row["model"], *(str(row[name]) if name != "compiled" else "compiled" * row[name] for name in varied)]
        lines.setdefault(" ".join(filter(None, words)), []).append(row)
    step = "training step" if rows[0]["training"] else "inference"
    quantities = (
        (f"seconds per image, {step}", lambda row: row["seconds"] / row["batch"]),
        (f"MiB, {step}, batch {rows[0]['batch']}: added by the network", lambda row: row.get("added_mib")),
    )
    for axes, (label, value) in zip(figure.subplots(1, 2), quantities, strict=True):
        for number, (name, line_rows) in enumerate(lines.items()):
            points = [((row["height"] * row["width"]) ** 0.5, value(row)) for row in line_rows if value(row)]
            if points:
                axes.plot(*zip(*sorted(points), strict=True), label=name, **style(number))
        sides = sorted({round((row["height"] * row["width"]) ** 0.5) for row in rows})
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sides, [str(side) for side in sides], minor=False)
        axes.set_xlabel("side of the image, pixels")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    save_figure(figure, out, dpi=110)
