# SPDX-License-Identifier: Apache-2.0
"""Score a segmentation checkpoint on labelled images, or any folder of label PNGs against the true ones."""

import math
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sola_vision.commands.arguments import (
    Arguments,
    check_minimum,
    evaluation_folder,
    out_folder,
    plain,
    print_skipped_count,
    refuse_unused,
)
from sola_vision.commands.results import agree_on_skipped, finite, prepare_folder, shard, watched, write_results
from sola_vision.commands.tables import new_table, show_table
from sola_vision.data import LabelRule, SegmentationConfig, SegmentationEvalTransform, open_segmentation
from sola_vision.data.labels import class_names_file, read_class_names
from sola_vision.data.segmentation import SegmentationFolder
from sola_vision.engine import EvaluationBatches, World, distributed, gather_objects
from sola_vision.engine.log import json_text
from sola_vision.tasks.inference import Inference
from sola_vision.tasks.label_pictures import Example, draw_worst
from sola_vision.tasks.label_scores import pair_folders
from sola_vision.tasks.pictures import draw_confusion
from sola_vision.tasks.segmentation import PixelCounts, listed, share_right
from sola_vision.tasks.segmenter import SegmentationCheckpoint, load_segmenter
from sola_vision.wording import amount

_WORST = 6
_COLUMNS = ("class", "pixels", "iou", "accuracy", "precision")
_ROWS = 40  # a longer table shows only the classes that occur


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = _parse(arguments)
    if options.predictions:
        _score_folder(options)
    else:
        _score_checkpoint(options)


def add_inference(parser: Arguments) -> None:
    """Add the inference options that eval and predict share."""
    parser.add_argument("--size", type=int, help="pixels of an image's shorter side (default: as in training)")
    parser.add_argument(
        "--slide", type=int, help="side of sliding windows; 0 = the whole image (default: as in training)"
    )
    parser.add_argument("--stride", type=int, help="step between windows (default: two thirds of their side)")
    # None unless given, so that --predictions can reject it
    parser.add_argument("--flip", action="store_true", default=None, help="also predict the mirrored image")
    parser.add_argument(
        "--scales", type=float, nargs="+", help="relative sizes to predict at, such as 0.5 1 1.5 (default: 1)"
    )


def inference_of(image: SegmentationConfig, options: Namespace) -> tuple[SegmentationConfig, Inference]:
    """Return the settings of images and inference; those that the options do not give are as in training."""
    if options.size is not None:
        image = replace(image, size=options.size)
    if options.slide is None:
        slide, stride = image.slide, image.stride if options.stride is None else options.stride
    else:
        slide, stride = options.slide or None, options.stride
    return image, Inference(slide=slide, stride=stride, flip=bool(options.flip), scales=tuple(options.scales or (1.0,)))


def make_parser() -> Arguments:
    """Return the parser of the command."""
    parser = Arguments("sola eval", __doc__)
    parser.add_argument("--checkpoint", help="best.safetensors, or a run's folder")
    parser.add_argument("--data", help="folder with images/SPLIT and annotations/SPLIT")
    parser.add_argument("--split", default="val", help="train or val (default)")
    parser.add_argument("--predictions", help="folder of label PNGs to score instead of a checkpoint")
    parser.add_argument("--annotations", help="folder of the true label PNGs, with the same names and sizes")
    parser.add_argument("--classes", type=int, help="number of classes of --predictions")
    parser.add_argument(
        "--ignore",
        type=int,
        help="ignored label; if 0, the classes are the labels 1..N, otherwise 0..N-1",
    )
    add_inference(parser)
    parser.add_argument("--workers", type=int, default=2, help="number of processes that read images")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument(
        "--out", help="folder for tables and pictures (default: eval/, next to the checkpoint if one is given)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    return parser


def _parse(arguments: Sequence[str]) -> Namespace:
    options = make_parser().parse_args(list(arguments))
    needed = ("annotations", "classes", "ignore") if options.predictions else ("checkpoint", "data")
    missing = [f"--{name}" for name in needed if getattr(options, name) is None]
    if missing:
        command = "eval --predictions" if options.predictions else "eval of a segmenter"
        raise ValueError(f"sola {command} also needs {' and '.join(missing)}")
    if options.predictions:
        refuse_unused(options, "predictions", ("checkpoint", "data", "size", "slide", "stride", "flip", "scales"))
    check_minimum(options, workers=0)
    return options


def _score_folder(options: Namespace) -> None:
    out = out_folder(options.out or "eval")
    rule = LabelRule(options.classes, options.ignore)
    annotations = Path(options.annotations)
    pairs = pair_folders(Path(options.predictions), annotations)
    # the names of the classes, if any, are in the folder of annotations or in one of the two above it
    roots = [root for root in (annotations, *annotations.resolve().parents[:2]) if class_names_file(root)]
    names = read_class_names(roots[0] if roots else annotations, options.classes, options.ignore)
    counts, images = PixelCounts.of(rule.num_classes), []
    start = time.perf_counter()
    for pair in watched(pairs, len(pairs), "scoring"):
        predicted, truth = (torch.from_numpy(classes) for classes in pair.read(rule))
        counts.add(predicted, truth)
        images.append(share_right(predicted, truth))
    prepare_folder(out, options)
    result = {
        "predictions": options.predictions,
        "annotations": options.annotations,
        "rule": str(rule),
        **_numbers(counts, names, len(pairs), time.perf_counter() - start),
        "image_accuracy": {pair.name: finite(right) for pair, right in zip(pairs, images, strict=True)},
    }
    worst = []
    for index in _worst(images):
        predicted_classes, true_classes = pairs[index].read(rule)
        worst.append(Example(pairs[index].name, None, true_classes, predicted_classes, images[index]))
    _write(result, counts, names, worst, out, options.json)


def _score_checkpoint(options: Namespace) -> None:
    out = out_folder(options.out or evaluation_folder(options.checkpoint))
    checkpoint = load_segmenter(options.checkpoint)
    image, inference = inference_of(checkpoint.image, options)
    dataset, _ = open_segmentation(
        options.data, options.split, image.ignore, None, SegmentationEvalTransform(image), checkpoint.classes
    )
    dataset.check_labels()
    with distributed(options.device) as world:
        checkpoint.model.to(world.device)
        if world.is_main:
            prepare_folder(out, options)
        start = time.perf_counter()
        counts, images, skipped = _evaluate(checkpoint, dataset, inference, world, options.workers)
        seconds = time.perf_counter() - start
        if not world.is_main:
            return
        result = {
            "checkpoint": str(options.checkpoint),
            "data": options.data,
            "split": options.split,
            "model": checkpoint.name,
            "rule": str(dataset.rule),
            "size": image.size,
            "inference": vars(inference),
            **_numbers(counts, checkpoint.classes, len(images), seconds),
            "images_skipped": skipped,
            "image_accuracy": {dataset.names[index]: finite(right) for index, right in images.items()},
        }
        worst = []
        for index in _worst(images):
            picture, truth = dataset.image(index), dataset.classes(index)
            predicted = _predicted(checkpoint, inference, dataset, index, world.device)
            worst.append(Example(dataset.names[index], picture, truth, predicted, images[index]))
    _write(result, counts, checkpoint.classes, worst, out, options.json)


@torch.inference_mode()
def _evaluate(
    checkpoint: SegmentationCheckpoint, dataset: SegmentationFolder, inference: Inference, world: World, workers: int
) -> tuple[PixelCounts, dict[int, float], int]:
    """Return the counts, the percentage of correct pixels by image, and the number of skipped images."""
    batches = EvaluationBatches(dataset, world, batch_size=1, workers=workers, collate=listed)
    counts, right = PixelCounts.of(len(checkpoint.classes)), []
    for batch in watched(batches, len(shard(len(dataset), world)), "evaluating", world.is_main):
        for image, classes in batch:
            predicted = inference(checkpoint.model, image, (classes.shape[0], classes.shape[1]))
            counts.add(predicted, classes)
            right.append(share_right(predicted, classes))
    read = agree_on_skipped(batches)
    images = dict(sorted(gather_objects(list(zip(read, right, strict=True)))))
    return counts.reduced(world.device), images, len(batches.skipped.known)


@torch.inference_mode()
def _predicted(
    checkpoint: SegmentationCheckpoint,
    inference: Inference,
    dataset: SegmentationFolder,
    index: int,
    device: torch.device,
) -> Any:
    image, classes = dataset[index]
    predicted = inference(checkpoint.model, image.to(device), (classes.shape[0], classes.shape[1]))
    return predicted.cpu().numpy()


def _numbers(counts: PixelCounts, names: Sequence[str], images: int, seconds: float) -> dict[str, Any]:
    rows = zip(names, counts.pixels, counts.iou, counts.accuracy, counts.precision, strict=True)
    return {
        "images": images,
        # NaN where no pixel of the set counts
        **{name: finite(value) for name, value in counts.metrics.items()},
        "classes_present": int(counts.metrics["classes_present"]),
        "seconds": round(seconds, 2),
        "classes": [
            {
                "class": name,
                "pixels": int(pixels),
                **{k: finite(100 * float(v)) for k, v in zip(_COLUMNS[2:], (iou, accuracy, precision), strict=True)},
            }
            for name, pixels, iou, accuracy, precision in rows
        ],
    }


def _worst(images: Sequence[float] | dict[int, float]) -> list[int]:
    """Return the images with the lowest share of correct pixels, worst first."""
    items = images.items() if isinstance(images, dict) else enumerate(images)
    return [index for index, right in sorted(items, key=lambda item: item[1]) if math.isfinite(right)][:_WORST]


def _write(
    result: dict[str, Any],
    counts: PixelCounts,
    names: Sequence[str],
    worst: Sequence[Example],
    out: Path,
    as_json: bool,
) -> None:
    write_results(result, out)
    # in percent of the true class's pixels, since counts of seven digits are unreadable in a cell
    shares = counts.confusion[:, :-1].double()
    shares = (100 * shares / counts.confusion.sum(1, keepdim=True).clamp(min=1)).round()
    draw_confusion(shares, names, out / "confusion.png")
    draw_worst(worst, names, out / "worst.png")
    if as_json:
        print(json_text(result))
        return
    _print(result)
    split = f" of {result['split']}" if "split" in result else ""
    print(f"eval.json, classes.csv, confusion.png and worst.png{split} are in {out}")


def _print(result: dict[str, Any]) -> None:
    classes = result["classes"]
    occurring = [row for row in classes if row["iou"] is not None]
    what = result.get("model", result.get("predictions"))
    where = f"{result['data']}, {result['split']}" if "data" in result else result["annotations"]
    title = plain(f"{what} on {where}: {amount(result['images'], 'image')}, {result['rule']}")
    table = new_table(title, "class", "pixels %", "IoU %", "accuracy %", "precision %")
    total = max(1, sum(row["pixels"] for row in classes))
    for row in classes if len(classes) <= _ROWS else occurring:
        numbers = ("-" if row[name] is None else f"{row[name]:.1f}" for name in _COLUMNS[2:])
        table.add_row(plain(row["class"]), f"{100 * row['pixels'] / total:.2f}", *numbers)
    show_table(table, 0)
    if result["miou"] is None:
        print("no pixel of these images counts: every label is ignored")
        return
    print(
        f"mIoU {result['miou']:.2f} % over the "
        f"{amount(len(occurring), 'class that occurs', 'classes that occur')}, {result['miou_all']:.2f} % over "
        f"all {len(classes)} (absent ones count as 0, as in ADE20K's script); mean accuracy "
        f"{result['mean_accuracy']:.2f} %, pixel accuracy {result['pixel_accuracy']:.2f} %"
    )
    print_skipped_count(result.get("images_skipped", 0))
