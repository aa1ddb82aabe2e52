# SPDX-License-Identifier: Apache-2.0
"""`sola train RECIPE --data FOLDER`: trains a network and leaves a run's folder."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sola_vision.commands.options import Run, parse_run
from sola_vision.data import EvalTransform, TrainTransform, open_classification
from sola_vision.engine import check_folder, distributed, fit
from sola_vision.tasks import Classification, build_model, initialise, metadata
from sola_vision.tasks.pictures import draw_learning_curve


def run(arguments: Sequence[str]) -> None:
    asked = parse_run(arguments)
    with distributed(asked.configuration.train.device) as world:
        _run(asked, world.is_main)


def _run(asked: Run, main: bool) -> None:
    recipe = asked.configuration
    # everything that can be wrong is looked at before anything is written
    check_folder(asked.out, asked.resume)
    train_set = open_classification(asked.data, "train", TrainTransform(recipe.image))
    classes = train_set.classes
    val_set = open_classification(asked.data, "val", EvalTransform(recipe.image), classes)
    model = build_model(recipe.model, len(classes), recipe.image.size)
    task = Classification(len(classes), recipe.image)
    if recipe.init:
        report = initialise(model, recipe.init)
        if main:
            print(report, file=sys.stderr)

    if main:
        asked.out.mkdir(parents=True, exist_ok=True)
        if not asked.resume:
            (asked.out / "config.yaml").write_text(asked.text)
        print(
            f"{recipe.model.name} on {len(train_set)} images of {len(classes)} classes from {asked.data}, "
            f"{len(val_set)} held out; the run's folder is {asked.out}",
            file=sys.stderr,
        )
    summary = fit(
        task,
        model,
        train_set,
        val_set,
        recipe.train,
        asked.out,
        resume=asked.resume,
        metadata=metadata("classification", recipe.model, recipe.image, classes, model),
    )
    if main:
        draw_learning_curve(asked.out / "metrics.jsonl", asked.out / "curve.png", "top1")
        _report(summary, asked.out, asked.json)


def _report(summary: dict[str, object], out: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    numbers = " ".join(f"{name} {summary[name]:.2f}" for name in ("top1", "top5", "loss") if name in summary)
    print(f"{numbers}; best.safetensors, curve.png and summary.json are in {out}")
