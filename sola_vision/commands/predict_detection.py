# SPDX-License-Identifier: Apache-2.0
"""`sola predict IMAGE-OR-FOLDER --checkpoint FILE` for detection: boxes, and masks if the detector predicts them.

Writes pictures/NAME.jpg (boxes, masks, labels), results.json (COCO's results; image_id counts the images from 1, as
images.json does) and, for a folder, index.html to browse them.
"""

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from sola_vision.commands.arguments import (
    Arguments,
    check_leftovers,
    check_minimum,
    image_files,
    name_below,
    out_folder,
    plain,
    print_skipped,
)
from sola_vision.commands.evaluate_detection import image_at
from sola_vision.commands.results import watched
from sola_vision.commands.tables import show_table
from sola_vision.data import CorruptImage, mask_library, read_image, to_pixels
from sola_vision.engine import distributed
from sola_vision.tasks.box_pictures import draw_shapes, shape_of
from sola_vision.tasks.detection import to_results
from sola_vision.tasks.detector import DetectorCheckpoint, detect, load_detector
from sola_vision.tasks.gallery import Card, write_gallery
from sola_vision.wording import amount


@dataclass(frozen=True)
class Prediction:
    """An image, its picture in the output folder, the number of objects of each class, and COCO's results."""

    image_id: int
    image: str
    height: int
    width: int
    picture: str
    objects: dict[str, int]
    results: list[dict[str, Any]]


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = _parse(arguments)
    source, out = Path(options.source), out_folder(options.out)
    files = image_files(source, out)
    check_leftovers(out, [_picture(name_below(file, source)) for file in files])
    mask_library()
    checkpoint = load_detector(options.checkpoint)
    checkpoint.model.transform.config = image_at(checkpoint.image, options.size)
    checkpoint.model.roi_heads.score_thresh = options.threshold
    if options.max_dets:
        checkpoint.model.roi_heads.detections_per_img = options.max_dets
    with distributed(options.device) as world:
        checkpoint.model.to(world.device)
        unreadable: list[str] = []
        rows = list(_predict(files, checkpoint, options, world.device, unreadable))
    print_skipped(rows, unreadable)
    _write(rows, checkpoint, source, out)
    if options.json:
        images = [asdict(row) for row in rows]
        document = {"model": checkpoint.name, "classes": checkpoint.classes, "out": str(out), "images": images}
        print(json.dumps(document | {"unreadable": unreadable}, indent=2))
    else:
        _print(rows)
        page = "index.html to browse, " if source.is_dir() else ""
        print(f"{page}pictures/, results.json and images.json, which has its image ids, are in {out}")


def make_parser() -> Arguments:
    """Return the parser of the command."""
    parser = Arguments("sola predict", __doc__)
    parser.add_argument("source", help="an image, or a folder of images, searched with its subfolders")
    parser.add_argument("--checkpoint", required=True, help="best.safetensors, or a run's folder")
    parser.add_argument("--out", default="predictions", help="folder for results and pictures (default: predictions)")
    parser.add_argument("--threshold", type=float, default=0.5, help="objects below this score are discarded")
    parser.add_argument("--max-dets", type=int, help="largest number of objects per image (default: as in training)")
    parser.add_argument("--size", type=int, help="pixels of an image's shorter side (default: as in training)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    return parser


def _parse(arguments: Sequence[str]) -> Namespace:
    options = make_parser().parse_args(list(arguments))
    if not 0 <= options.threshold <= 1:
        raise ValueError(f"--threshold {options.threshold} must lie between 0 and 1")
    check_minimum(options, max_dets=1)
    return options


def _predict(
    files: list[Path],
    checkpoint: DetectorCheckpoint,
    options: Namespace,
    device: torch.device,
    unreadable: list[str],
) -> Iterator[Prediction]:
    source, out = Path(options.source), Path(options.out)
    labels = {number: label for label, number in enumerate(checkpoint.category_ids)}
    number = 0
    for file in watched(files, len(files), "predicting"):
        name = name_below(file, source)
        try:
            image = read_image(file)
        except (CorruptImage, OSError) as error:
            unreadable.append(str(error))
            continue
        number += 1
        found = detect(checkpoint.model, [to_pixels(image).to(device)])[0]
        results = to_results(found, number, (image.height, image.width), checkpoint.category_ids)
        shapes = []
        for result in results:
            mask = mask_library().decode(result["segmentation"]) if "segmentation" in result else None
            shapes.append(shape_of(result, labels, mask))
        picture = _picture(name)
        (out / picture).parent.mkdir(parents=True, exist_ok=True)
        draw_shapes(image, shapes, checkpoint.classes).save(out / picture, quality=90)
        counts = Counter(checkpoint.classes[shape.label] for shape in shapes)
        objects = dict(counts.most_common())
        yield Prediction(number, name, image.height, image.width, picture.as_posix(), objects, results)


def _picture(name: str) -> Path:
    return Path("pictures") / f"{name}.jpg"


def _write(rows: list[Prediction], checkpoint: DetectorCheckpoint, source: Path, out: Path) -> None:
    results = [result for row in rows for result in row.results]
    (out / "results.json").write_text(json.dumps(results) + "\n")
    images = [{"id": r.image_id, "file_name": r.image, "height": r.height, "width": r.width} for r in rows]
    categories = [
        {"id": number, "name": name} for number, name in zip(checkpoint.category_ids, checkpoint.classes, strict=True)
    ]
    (out / "images.json").write_text(json.dumps({"images": images, "categories": categories}) + "\n")
    if source.is_dir():
        cards = [
            Card(row.image, row.picture, [f"{count} {name}" for name, count in row.objects.items()]) for row in rows
        ]
        write_gallery(out / "index.html", f"{checkpoint.name}: {amount(len(rows), 'image')} of {source.name}", cards)


def _print(rows: list[Prediction]) -> None:
    table = Table()
    table.add_column("image", overflow="fold")
    table.add_column("objects", justify="right")
    table.add_column("of which")
    for row in rows:
        named = ", ".join(f"{count} {name}" for name, count in row.objects.items())
        table.add_row(plain(row.image), str(sum(row.objects.values())), plain(named))
    show_table(table, 0)
