# SPDX-License-Identifier: Apache-2.0
"""Figure 1(a), extended: accuracy against cost in the paper's Tables 3, 4 and 5, and in the studies run here.

The paper's points are its printed numbers, including costs. The finished studies of a folder are drawn in separate
panels, because their images and networks differ from the paper's.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sola_vision.analysis.labels import label_points
from sola_vision.analysis.paper import ROWS
from sola_vision.colours import BLUE, SKY, VERMILION
from sola_vision.fonts import save_figure

from .outcome import RESULTS, Outcome, gather
from .pages import Block, Heading, Picture, Table, Text, write_page

# (table, method) -> the paper's accuracy; methods and costs as in analysis.paper
# fmt: off
ACCURACY = {
    "3": {
        "ResNet-18": 69.9, "DeiT-T": 72.2, "PVT-T": 75.1, "EffFormer-L1": 79.2, "Vim-T": 76.1, "VRWKV-T": 75.1,
        "EffVMamba-S": 78.7, "SoLA-T": 79.8, "ConvNeXt-T": 82.0, "DeiT-S": 79.8, "PVT-M": 81.2, "Swin-T": 81.3,
        "Vim-S": 80.3, "VRWKV-S": 80.1, "VMamba-T": 82.6, "Agent-Swin-T": 82.6, "VGamba-L": 82.8,
        "MambaVision-T": 82.3, "SoLA-S": 82.9, "ConvNeXt-B": 83.8, "DeiT-B": 81.8, "Swin-B": 83.4, "Vim-B": 81.9,
        "VRWKV-B": 82.0, "VMamba-B": 83.9, "Agent-Swin-B": 84.0, "MambaVision-B": 84.2, "SoLA-B": 84.1,
    },
    "4": {
        "ViT-T + adapter": 41.6, "VRWKV-T": 41.7, "SoLA-T": 43.8, "ViT-S + adapter": 44.9, "VRWKV-S": 44.8,
        "SoLA-S": 46.6, "ViT-B + adapter": 46.8, "VRWKV-B": 46.8, "SoLA-B": 47.5,
    },
    "5": {
        "ViT-T + adapter": 42.6, "VRWKV-T": 43.3, "EffVMamba-T": 38.9, "SoLA-T": 44.7, "ViT-S + adapter": 46.2,
        "VRWKV-S": 47.2, "Swin-T": 44.5, "MambaVision-S": 46.0, "SoLA-S": 48.1, "ViT-B + adapter": 48.8,
        "VRWKV-B": 49.2, "Swin-B": 48.1, "MambaVision-B": 49.1, "SoLA-B": 50.5,
    },
}
MASK_AP = {  # of Table 4, whose accuracy above is the box AP
    "ViT-T + adapter": 37.9, "VRWKV-T": 38.0, "SoLA-T": 40.0, "ViT-S + adapter": 40.1, "VRWKV-S": 40.2, "SoLA-S": 42.0,
    "ViT-B + adapter": 41.8, "VRWKV-B": 41.7, "SoLA-B": 42.3,
}
_PANELS = {
    "3": ("ImageNet-1K at 224 x 224", "top-1, %"),
    "4": ("COCO, Mask R-CNN 1x, 1333 x 800", "box AP"),
    "5": ("ADE20K, UPerNet, 512 x 512", "mIoU"),
}
# fmt: on
_SOLA, _OTHERS, _OURS = VERMILION, SKY, BLUE
_DPI = 100  # of the layout in which labels are placed, and of the file


def write_fig1a(folder: Path) -> None:
    """Write FOLDER/fig1a/report.md, report.html and accuracy.png."""
    place = folder / "fig1a"
    place.mkdir(parents=True, exist_ok=True)
    outcomes = [gather(folder, path.parent.name) for path in sorted(folder.glob(f"*/{RESULTS}"))]
    ours = [outcome for outcome in outcomes if any(row.mean is not None for row in outcome.rows)]
    _draw(ours, place / "accuracy.png")
    write_page(place, "Figure 1(a): accuracy against cost", _blocks(ours))


def _draw(ours: Sequence[Outcome], out: Path) -> None:
    lower = -(-len(ours) // 3)
    figure = Figure(figsize=(16, 4.8 * (1 + lower)), layout="constrained", dpi=_DPI)
    named: dict[Axes, list[tuple[str, float, float]]] = {}
    panels = figure.subplots(1 + lower, 3, squeeze=False)
    for axes in panels.flat[3 + len(ours) :]:
        axes.axis("off")
    for axes, (table, (title, unit)) in zip(panels[0], _PANELS.items(), strict=True):
        known = [
            (printed.method, printed.gmacs, ACCURACY[table][printed.method])
            for printed in ROWS
            if printed.table == table and printed.method in ACCURACY[table] and printed.gmacs is not None
        ]
        axes.set_title(f"the paper's Table {table}: {title}", fontsize=10)
        axes.set_xlabel("GMACs, as printed")
        axes.set_ylabel(unit)
        axes.set_xscale("log")
        _points(axes, known, [_SOLA if name.startswith("SoLA") else _OTHERS for name, _, _ in known])
        named[axes] = known
    for axes, outcome in zip(panels.flat[3:], ours, strict=False):
        done = [(row.name, row.macs / 1e6, row.mean) for row in outcome.rows if row.mean is not None]
        _points(axes, done, [_OURS] * len(done))
        named[axes] = done
        axes.set_title(f"here, {outcome.study.name}: scale {outcome.plan['scale']}", fontsize=10)
        axes.set_xlabel(f"MMACs at {outcome.plan['cost_size']} pixels")
        axes.xaxis.set_major_locator(MaxNLocator(6))  # more labels than these touch each other
        axes.set_ylabel(f"{outcome.study.metric}, %, on {outcome.plan['data']['name']}")
    for axes, points in named.items():
        label_points(figure, axes, points)
    save_figure(figure, out, dpi=_DPI)


def _points(axes: Axes, points: list[tuple[str, float, float]], colours: list[str]) -> None:
    """Draw each (name, MACs, accuracy) as a dot."""
    axes.grid(alpha=0.3)
    axes.margins(x=0.15, y=0.1)
    for (_, macs, accuracy), colour in zip(points, colours, strict=True):
        axes.plot(macs, accuracy, color=colour, marker="o", linestyle="none")


def _blocks(ours: Sequence[Outcome]) -> list[Block]:
    rows = [
        [
            f"Table {row.table}",
            row.method,
            "" if row.gmacs is None else f"{row.gmacs:g}",
            f"{accuracy:g}",
            f"{MASK_AP[row.method]:g}" if row.table == "4" else "",
        ]
        for row in ROWS
        if (accuracy := ACCURACY.get(row.table, {}).get(row.method)) is not None
    ]
    measured = [
        [
            outcome.study.name,
            row.name,
            f"{row.macs / 1e9:.4f}",
            row.text,
        ]
        for outcome in ours
        for row in outcome.rows
        if row.mean is not None
    ]
    blocks: list[Block] = [
        Picture("accuracy.png", "accuracy against cost"),
        Text(
            "Upper row: the numbers printed in the paper (arXiv 2601.11164, Tables 3 to 5), its own and those it "
            "quotes; networks without a printed cost are omitted. None of them was measured here."
        ),
    ]
    if measured:
        blocks += [
            Text("Lower rows: the studies run here; their pages state the images and the length of training."),
            Heading(2, "Here"),
            Table(["study", "arm", "GMACs", "accuracy (seeds)"], measured),
        ]
    else:
        blocks.append(Text("No study has been run in this folder yet."))
    return [
        *blocks,
        Heading(2, "The paper's numbers"),
        Text("Accuracy is top-1 on ImageNet-1K (Table 3), box AP on COCO (Table 4) and mIoU on ADE20K (Table 5)."),
        Table(["source", "method", "GMACs", "accuracy", "mask AP"], rows),
    ]
