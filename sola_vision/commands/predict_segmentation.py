# SPDX-License-Identifier: Apache-2.0
"""`sola predict IMAGE-OR-FOLDER --checkpoint FILE` for segmentation: the class of each pixel of an image.

Writes labels/NAME.png (labels as in the data that the checkpoint was trained on), pictures/NAME.jpg (the classes'
colours over the image, with a legend) and, for a folder, index.html to browse them.
"""

import json
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table

from sola_vision.commands.arguments import (
    Arguments,
    check_leftovers,
    image_files,
    name_below,
    out_folder,
    plain,
    print_skipped,
)
from sola_vision.commands.evaluate_segmentation import add_inference, inference_of
from sola_vision.commands.results import watched
from sola_vision.commands.tables import show_table
from sola_vision.data import CorruptImage, SegmentationEvalTransform, read_image
from sola_vision.engine import distributed
from sola_vision.tasks.gallery import Card, write_gallery
from sola_vision.tasks.label_pictures import class_shares, draw_overlay, write_labels
from sola_vision.tasks.segmenter import SegmentationCheckpoint, load_segmenter
from sola_vision.wording import amount

_SHOWN = 3  # classes of an image in the table


@dataclass(frozen=True)
class Prediction:
    """An image, its files in the output folder, and each class's share of its pixels, largest first."""

    image: str
    labels: str
    picture: str
    shares: dict[str, float]


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = _parse(arguments)
    source, out = Path(options.source), out_folder(options.out)
    files = image_files(source, out)
    check_leftovers(out, [path for paths in _outputs(files, source).values() for path in paths])
    checkpoint = load_segmenter(options.checkpoint)
    with distributed(options.device) as world:
        checkpoint.model.to(world.device)
        unreadable: list[str] = []
        rows = list(_predict(files, checkpoint, options, world.device, unreadable))
    print_skipped(rows, unreadable)
    if source.is_dir():
        cards = [
            Card(row.image, row.picture, [f"{name} {100 * share:.1f} %" for name, share in row.shares.items()])
            for row in rows
        ]
        write_gallery(out / "index.html", f"{checkpoint.name}: {amount(len(rows), 'image')} of {source.name}", cards)
    if options.json:
        images = [asdict(row) for row in rows]
        document = {"model": checkpoint.name, "rule": str(checkpoint.rule), "out": str(out), "images": images}
        print(json.dumps(document | {"unreadable": unreadable}, indent=2))
    else:
        _print(rows)
        page = "index.html to browse, " if source.is_dir() else ""
        print(f"{page}labels/ ({checkpoint.rule}) and pictures/ are in {out}")


def make_parser() -> Arguments:
    """Return the parser of the command."""
    parser = Arguments("sola predict", __doc__)
    parser.add_argument("source", help="an image, or a folder of images, searched with its subfolders")
    parser.add_argument("--checkpoint", required=True, help="best.safetensors, or a run's folder")
    parser.add_argument("--out", default="predictions", help="folder for labels and pictures (default: predictions)")
    parser.add_argument("--opacity", type=float, default=0.55, help="opacity of the colours over the image, 0 to 1")
    add_inference(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    return parser


def _parse(arguments: Sequence[str]) -> Namespace:
    options = make_parser().parse_args(list(arguments))
    if not 0 <= options.opacity <= 1:
        raise ValueError(f"--opacity {options.opacity} must lie between 0 (the image alone) and 1 (colours alone)")
    return options


@torch.inference_mode()
def _predict(
    files: list[Path],
    checkpoint: SegmentationCheckpoint,
    options: Namespace,
    device: torch.device,
    unreadable: list[str],
) -> Iterator[Prediction]:
    image_config, inference = inference_of(checkpoint.image, options)
    transform = SegmentationEvalTransform(image_config)
    source, out = Path(options.source), Path(options.out)
    outputs = _outputs(files, source)
    for file in watched(files, len(files), "predicting"):
        name = name_below(file, source)
        try:
            image = read_image(file)
        except (CorruptImage, OSError) as error:
            unreadable.append(str(error))
            continue
        pixels = transform.image(image).to(device)
        classes = inference(checkpoint.model, pixels, (image.height, image.width)).cpu().numpy()
        labels, picture = outputs[file]
        for below in (labels, picture):
            (out / below).parent.mkdir(parents=True, exist_ok=True)
        write_labels(out / labels, classes, checkpoint.rule)
        drawn = draw_overlay(image, classes, checkpoint.classes, options.opacity)
        drawn.save(out / picture, quality=90)
        shares = {checkpoint.classes[index]: share for index, share in class_shares(classes)}
        yield Prediction(name, labels.as_posix(), picture.as_posix(), shares)


def _outputs(files: Sequence[Path], source: Path) -> dict[Path, tuple[Path, Path]]:
    """Return the label file and the picture of each image."""
    stems = Counter(file.with_suffix("") for file in files)
    outputs = {}
    for file in files:
        name = name_below(file, source)
        # named like annotations, except where the folder has both a.jpg and a.png
        stem = name if stems[file.with_suffix("")] > 1 else os.path.splitext(name)[0]
        outputs[file] = Path("labels") / f"{stem}.png", Path("pictures") / f"{stem}.jpg"
    return outputs


def _print(rows: list[Prediction]) -> None:
    table = Table()
    table.add_column("image", overflow="fold")
    most = min(_SHOWN, max(len(row.shares) for row in rows))
    for rank in range(most):
        table.add_column("largest class" if rank == 0 else f"{rank + 1}.")
    for row in rows:
        named = [f"{name} {100 * share:.1f} %" for name, share in list(row.shares.items())[:_SHOWN]]
        table.add_row(plain(row.image), *(plain(text) for text in named))
    show_table(table, 0)
