# SPDX-License-Identifier: Apache-2.0
"""`sola eval --checkpoint FILE --data FOLDER` for a classifier: accuracy on labelled images, worst mistakes."""

import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sola_vision.commands.arguments import (
    Arguments,
    check_minimum,
    evaluation_folder,
    image_settings,
    out_folder,
    plain,
    print_skipped_count,
)
from sola_vision.commands.results import agree_on_skipped, finite, prepare_folder, write_results
from sola_vision.commands.tables import new_table, show_table
from sola_vision.data import EvalTransform, open_classification
from sola_vision.engine import EvaluationBatches, World, distributed
from sola_vision.engine.distributed import gather_objects
from sola_vision.engine.log import json_text
from sola_vision.tasks import Checkpoint, Tally, load_checkpoint
from sola_vision.tasks.pictures import draw_confusion, draw_predictions
from sola_vision.wording import amount

_OTHERS = """These are the options for a classifier. Of a detector or a segmentation network:
`sola eval --checkpoint RUN --help`; of result files: `sola eval --results FILE --help` (detections),
`sola eval --predictions FOLDER --help` (label PNGs)."""
_SHOWN = 12  # pictures of correct and of wrong predictions, each


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = _parse(arguments)
    out = out_folder(options.out or evaluation_folder(options.checkpoint))
    checkpoint = load_checkpoint(options.checkpoint)
    image = image_settings(checkpoint, options.size)
    dataset = open_classification(options.data, options.split, EvalTransform(image), checkpoint.classes)
    with distributed(options.device) as world:
        model = checkpoint.model.to(world.device)
        batches = EvaluationBatches(dataset, world, batch_size=options.batch_size, workers=options.workers)
        if world.is_main:
            prepare_folder(out, options)
        tally, best, seconds = _evaluate(model, batches, len(checkpoint.classes), world)
        if not world.is_main:
            return
    result = _result(options, checkpoint, tally, seconds, batches.skipped.known)
    write_results(result, out)
    draw_confusion(tally.confusion, checkpoint.classes, out / "confusion.png")
    _draw_examples(dataset, checkpoint.classes, best, result["top1"], out / "predictions.png")
    if options.json:
        print(json_text(result))
    else:
        _print(result, out)


def make_parser() -> Arguments:
    """Return the parser of the command."""
    parser = Arguments("sola eval", __doc__, epilog=_OTHERS)
    parser.add_argument("--checkpoint", required=True, help="best.safetensors, or a run's folder")
    parser.add_argument("--data", required=True, help="folder or .tar with val/CLASS/ images, or the word digits")
    parser.add_argument("--split", default="val", help="train or val (default)")
    parser.add_argument("--size", type=int, help="side of the network's input in pixels (default: as in training)")
    parser.add_argument("--batch-size", type=int, default=64, help="batch size")
    parser.add_argument("--workers", type=int, default=2, help="number of processes that read images")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", help="folder for tables and pictures (default: eval/ next to the checkpoint)")
    parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    return parser


def _parse(arguments: Sequence[str]) -> Namespace:
    options = make_parser().parse_args(list(arguments))
    check_minimum(options, batch_size=1, workers=0)
    return options


@torch.inference_mode()
def _evaluate(
    model: nn.Module, batches: EvaluationBatches, num_classes: int, world: World
) -> tuple[Tally, dict[int, tuple[int, float]], float]:
    """Return the counts, the predicted class and probability of every readable image, and the seconds taken."""
    tally = Tally.of(num_classes)
    best: list[tuple[int, float]] = []
    start = time.perf_counter()
    for images, labels in batches:
        logits = model(images)
        tally.add(logits, labels)
        probability, predicted = logits.float().softmax(1).max(1)
        best += zip(predicted.tolist(), probability.tolist(), strict=True)
    seconds = time.perf_counter() - start
    read = agree_on_skipped(batches)
    tally = tally.reduced(world.device)
    return tally, dict(sorted(gather_objects(list(zip(read, best, strict=True))))), seconds


def _result(
    options: Namespace, checkpoint: Checkpoint, tally: Tally, seconds: float, skipped: dict[int, str]
) -> dict[str, Any]:
    classes = []
    for index, name in enumerate(checkpoint.classes):
        images, right = int(tally.confusion[index].sum()), int(tally.confusion[index, index])
        named = int(tally.confusion[:, index].sum())
        classes.append(
            {
                "class": name,
                "images": images,
                "recall": 100 * right / images if images else None,
                "precision": 100 * right / named if named else None,
            }
        )
    return {
        "checkpoint": str(options.checkpoint),
        "data": options.data,
        "split": options.split,
        "model": checkpoint.name,
        "images": tally.images,
        # the loss of a network that diverged is NaN
        **{name: finite(value) for name, value in tally.metrics.items()},
        "images_skipped": len(skipped),
        "seconds": round(seconds, 2),
        "images_per_second": round(tally.images / seconds, 1),
        "classes": classes,
    }


def _draw_examples(
    dataset: Any, classes: list[str], best: dict[int, tuple[int, float]], top1: float, out: Path
) -> None:
    """Draw the most confident mistakes first, then correct predictions spread over the set."""
    all_wrong = [i for i, (predicted, _) in best.items() if predicted != dataset.targets[i]]
    wrong = sorted(all_wrong, key=lambda i: best[i][1], reverse=True)[:_SHOWN]
    all_right = [i for i, (predicted, _) in best.items() if predicted == dataset.targets[i]]
    right = _spread(all_right, 2 * _SHOWN - len(wrong))
    examples = [(dataset.image(i), classes[dataset.targets[i]], classes[best[i][0]], best[i][1]) for i in wrong + right]
    draw_predictions(
        examples, out, f"top-1 {top1:.2f} %; the most confident mistakes are framed, then correct predictions"
    )


def _spread(items: list[int], number: int) -> list[int]:
    """Return `number` of the items at even distances, or all if there are fewer."""
    return [items[i * len(items) // number] for i in range(number)] if len(items) > number else items


def _print(result: dict[str, Any], out: Path) -> None:
    images = amount(result["images"], "image")
    title = f"{result['model']} on {result['data']} ({result['split']}, {images})"
    table = new_table(plain(title), "class", "images", "recall %", "precision %")
    for row in result["classes"]:
        numbers = ("-" if row[name] is None else f"{row[name]:.1f}" for name in ("recall", "precision"))
        table.add_row(plain(row["class"]), str(row["images"]), *numbers)
    if len(result["classes"]) <= 100:
        show_table(table, 0)
    loss = "not a number" if result["loss"] is None else f"{result['loss']:.4f}"
    # top-5 is always 100 % with up to five classes
    top5 = f"top-5 {result['top5']:.2f} %, " if len(result["classes"]) > 5 else ""
    print(
        f"top-1 {result['top1']:.2f} %, {top5}loss {loss}, "
        f"{result['images_per_second']:.0f} images/s including data loading"
    )
    print_skipped_count(result["images_skipped"])
    print(f"eval.json, classes.csv, confusion.png and predictions.png of {result['split']} are in {out}")
