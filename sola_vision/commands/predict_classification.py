# SPDX-License-Identifier: Apache-2.0
"""`sola predict IMAGE-OR-FOLDER --checkpoint FILE` for classification: the most likely classes of each image."""

import json
import os
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from sola_vision.commands.arguments import Arguments, check_minimum, image_files, image_settings, plain, print_skipped
from sola_vision.commands.results import finite
from sola_vision.commands.tables import show_table
from sola_vision.data import CorruptImage, EvalTransform, read_image
from sola_vision.engine import distributed
from sola_vision.tasks import Checkpoint, load_checkpoint

_OTHERS = """These are the options for a classifier. Of a detector or a segmentation network:
`sola predict --checkpoint RUN --help`."""


@dataclass(frozen=True)
class Prediction:
    """An image's most likely classes, best first: {"class": name, "probability": p} each; p is None for NaN."""

    image: str
    classes: list[dict[str, Any]]


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = _parse(arguments)
    source = Path(options.source)
    files = image_files(source)
    checkpoint = load_checkpoint(options.checkpoint)
    with distributed(options.device) as world:
        checkpoint.model.to(world.device)
        unreadable: list[str] = []
        rows = list(_predict(files, checkpoint, options, world.device, unreadable))
    print_skipped(rows, unreadable)
    if options.json:
        images = [asdict(row) for row in rows]
        print(json.dumps({"model": checkpoint.name, "images": images, "unreadable": unreadable}, indent=2))
    else:
        _print(rows, source)


def make_parser() -> Arguments:
    """Return the parser of the command."""
    parser = Arguments("sola predict", __doc__, epilog=_OTHERS)
    parser.add_argument("source", help="an image, or a folder of images, searched with its subfolders")
    parser.add_argument("--checkpoint", required=True, help="best.safetensors, or a run's folder")
    parser.add_argument("--top", type=int, default=3, help="how many classes to print for each image")
    parser.add_argument("--size", type=int, help="side of the network's input in pixels (default: as in training)")
    parser.add_argument("--batch-size", type=int, default=32, help="batch size")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    return parser


def _parse(arguments: Sequence[str]) -> Namespace:
    options = make_parser().parse_args(list(arguments))
    check_minimum(options, top=1, batch_size=1)
    return options


@torch.inference_mode()
def _predict(
    files: list[Path], checkpoint: Checkpoint, options: Namespace, device: torch.device, unreadable: list[str]
) -> Iterator[Prediction]:
    transform = EvalTransform(image_settings(checkpoint, options.size))
    top = min(options.top, len(checkpoint.classes))
    for start in range(0, len(files), options.batch_size):
        names, tensors = [], []
        for file in files[start : start + options.batch_size]:
            try:
                tensors.append(transform(read_image(file)))
                names.append(str(file))
            except (CorruptImage, OSError) as error:
                unreadable.append(str(error))
        if not tensors:
            continue
        probabilities, classes = checkpoint.model(torch.stack(tensors).to(device)).float().softmax(1).topk(top)
        for name, ps, cs in zip(names, probabilities.tolist(), classes.tolist(), strict=True):
            # a network that diverged returns NaN
            guesses = [{"class": checkpoint.classes[c], "probability": finite(p)} for p, c in zip(ps, cs, strict=True)]
            yield Prediction(name, guesses)


def _print(rows: list[Prediction], source: Path) -> None:
    table = Table()
    table.add_column("image", overflow="fold")
    most = max((len(row.classes) for row in rows), default=0)
    for rank in range(most):
        table.add_column("class" if rank == 0 else f"{rank + 1}.")
    for row in rows:
        guesses = [plain(f"{g['class']} {_percent(g['probability'])}") for g in row.classes]
        # relative to the given folder: long paths would be wrapped over several lines
        name = os.path.relpath(row.image, source if source.is_dir() else source.parent)
        table.add_row(plain(name), *guesses)
    show_table(table, 0)


def _percent(probability: float | None) -> str:
    return "not a number" if probability is None else f"{100 * probability:.1f} %"
