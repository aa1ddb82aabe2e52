# SPDX-License-Identifier: Apache-2.0
"""`sola eval --checkpoint FILE --data FOLDER` of a classifier: how good it is on labelled images, where it fails."""

import csv
import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from sola_vision.commands.arguments import Arguments, beside, image_settings, out_folder, plain, tell_unreadable
from sola_vision.data import EvalTransform, open_classification
from sola_vision.engine import EvaluationBatches, World, distributed
from sola_vision.engine.distributed import gather_objects
from sola_vision.tasks import Checkpoint, Tally, load_checkpoint
from sola_vision.tasks.pictures import draw_confusion, draw_predictions

_SHOWN = 12  # pictures of right and of wrong predictions, each


def run(arguments: Sequence[str]) -> None:
    options = _parse(arguments)
    out = out_folder(options.out or beside(options.checkpoint))
    checkpoint = load_checkpoint(options.checkpoint)
    image = image_settings(checkpoint, options.size)
    dataset = open_classification(options.data, options.split, EvalTransform(image), checkpoint.classes)
    with distributed(options.device) as world:
        model = checkpoint.model.to(world.device)
        batches = EvaluationBatches(dataset, world, batch_size=options.batch_size, workers=options.workers)
        if world.is_main:
            out.mkdir(parents=True, exist_ok=True)  # before the work, which could not be kept otherwise
        tally, best, seconds = _evaluate(model, batches, len(checkpoint.classes), world)
        if not world.is_main:
            return
    result = _result(options, checkpoint, tally, seconds, batches.skipped.known)
    (out / "eval.json").write_text(json.dumps(result, indent=2) + "\n")
    _write_classes(result["classes"], out / "classes.csv")
    draw_confusion(tally.confusion, checkpoint.classes, out / "confusion.png")
    _draw_examples(dataset, checkpoint.classes, best, result["top1"], out / "predictions.png")
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        _print(result, out)


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = Arguments("sola eval", __doc__)
    parser.add_argument("--checkpoint", required=True, help="best.safetensors, or a run's folder")
    parser.add_argument("--data", required=True, help="folder or .tar with val/CLASS/ images, or the word digits")
    parser.add_argument("--split", default="val", help="train or val (default)")
    parser.add_argument("--size", type=int, help="pixels a side of what the network sees (default: as in training)")
    parser.add_argument("--batch-size", type=int, default=64, help="images the network sees at once")
    parser.add_argument("--workers", type=int, default=2, help="processes that read images")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", help="folder for tables and pictures (default: eval/ beside the checkpoint)")
    parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    options = parser.parse_args(list(arguments))
    for name in ("batch_size", "workers"):
        if getattr(options, name) < (1 if name == "batch_size" else 0):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)} is too small")
    return options


@torch.inference_mode()
def _evaluate(
    model: nn.Module, batches: EvaluationBatches, num_classes: int, world: World
) -> tuple[Tally, dict[int, tuple[int, float]], float]:
    """The counts, the best class of every readable image with its probability, and the seconds of it all."""
    tally = Tally.of(num_classes)
    best: list[tuple[int, float]] = []
    start = time.perf_counter()
    for images, labels in batches:
        logits = model(images)
        tally.add(logits, labels)
        probability, predicted = logits.float().softmax(1).max(1)
        best += zip(predicted.tolist(), probability.tolist(), strict=True)
    seconds = time.perf_counter() - start
    mine = [
        index for index in range(world.rank, batches.skipped.size, world.size) if index not in batches.skipped.fresh
    ]
    batches.skipped.share(lambda text: print(f"sola: {text}", file=sys.stderr) if world.is_main else None)
    tally = tally.reduced(world.device)
    return tally, dict(sorted(gather_objects(list(zip(mine, best, strict=True))))), seconds


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
        # JSON has no nan, which is the loss of a network that diverged
        **{name: value if math.isfinite(value) else None for name, value in tally.metrics.items()},
        "images_skipped": len(skipped),
        "seconds": round(seconds, 2),
        "images_per_second": round(tally.images / seconds, 1),
        "classes": classes,
    }


def _write_classes(classes: list[dict[str, Any]], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["class", "images", "recall", "precision"])
        writer.writeheader()
        writer.writerows(classes)


def _draw_examples(
    dataset: Any, classes: list[str], best: dict[int, tuple[int, float]], top1: float, out: Path
) -> None:
    """The most confident mistakes first, then right answers spread over the set."""
    all_wrong = [i for i, (predicted, _) in best.items() if predicted != dataset.targets[i]]
    wrong = sorted(all_wrong, key=lambda i: best[i][1], reverse=True)[:_SHOWN]
    all_right = [i for i, (predicted, _) in best.items() if predicted == dataset.targets[i]]
    right = all_right[:: max(1, len(all_right) // (2 * _SHOWN - len(wrong)))][: 2 * _SHOWN - len(wrong)]
    examples = [(dataset.image(i), classes[dataset.targets[i]], classes[best[i][0]], best[i][1]) for i in wrong + right]
    draw_predictions(examples, out, f"top-1 {top1:.2f} %; the surest mistakes are framed, then right answers")


def _print(result: dict[str, Any], out: Path) -> None:
    title = f"{result['model']} on {result['data']} ({result['split']}, {result['images']} images)"
    table = Table(title=plain(title))
    for column in ("class", "images", "recall %", "precision %"):
        table.add_column(column, justify="left" if column == "class" else "right")
    for row in result["classes"]:
        numbers = ("-" if row[name] is None else f"{row[name]:.1f}" for name in ("recall", "precision"))
        table.add_row(plain(row["class"]), str(row["images"]), *numbers)
    console = Console()
    if len(result["classes"]) <= 100:
        console.print(table)
    loss = "not a number" if result["loss"] is None else f"{result['loss']:.4f}"
    print(
        f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} %, loss {loss}, "
        f"{result['images_per_second']:.0f} images/s reading included"
    )
    tell_unreadable(result["images_skipped"])
    print(f"eval.json, classes.csv, confusion.png and predictions.png of {result['split']} are in {out}")
