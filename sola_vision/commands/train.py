# SPDX-License-Identifier: Apache-2.0
"""`sola train RECIPE --data FOLDER`: trains a network and leaves a run's folder."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from sola_vision.commands.options import Run, parse_run
from sola_vision.data import EvalTransform, ImageConfig, TrainTransform, open_classification
from sola_vision.engine import World, check_folder, distributed, fit, read_metadata
from sola_vision.engine.loading import count_epoch_steps, micro_batch_size
from sola_vision.engine.optim import count_steps, make_optimizer
from sola_vision.tasks import Classification, build_model, initialise, metadata
from sola_vision.tasks.pictures import draw_learning_curve


def run(arguments: Sequence[str]) -> None:
    asked = parse_run(arguments)
    with distributed(asked.configuration.train.device) as world:
        _run(asked, world)


def _run(asked: Run, world: World) -> None:
    recipe = asked.configuration
    # everything that can be wrong is looked at before anything is written
    check_folder(asked.out, asked.resume)
    train_set = open_classification(asked.data, "train", _train_transform(recipe.image))
    classes = train_set.classes
    val_set = open_classification(asked.data, "val", EvalTransform(recipe.image), classes)
    if asked.resume:
        _check_classes(asked.out / "best.safetensors", classes)
    torch.manual_seed(recipe.train.seed)  # of the initial weights
    model = build_model(recipe.model, len(classes), recipe.image.size)
    task = Classification(len(classes), recipe.image)
    report = initialise(model, recipe.init, classes) if recipe.init and not asked.resume else None
    count_steps(recipe.train, count_epoch_steps(len(train_set), recipe.train))
    task.check_batch(micro_batch_size(recipe.train, world))
    make_optimizer(model, recipe.train)
    if recipe.train.strategy == "fsdp" and not torch.distributed.is_initialized():
        raise ValueError("--train.strategy fsdp needs processes: start with torchrun --nproc-per-node N, or use ddp")

    if world.is_main:
        asked.out.mkdir(parents=True, exist_ok=True)
        if not asked.resume:
            (asked.out / "config.yaml").write_text(asked.text)
        if report:
            print(report, file=sys.stderr)
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
    if world.is_main:
        draw_learning_curve(asked.out / "metrics.jsonl", asked.out / "curve.png", "top1")
        _report(summary, asked.out, asked.json)


def _train_transform(image: ImageConfig) -> TrainTransform:
    try:
        return TrainTransform(image)
    # timm asserts what it can read of an augmentation policy
    except (AssertionError, KeyError, ValueError) as error:
        text = str(error) or "not a policy of timm's"
        raise ValueError(f"--image.auto_augment {image.auto_augment}: {text}; rand-m9-mstd0.5-inc1 is Swin's") from None


def _check_classes(best: Path, classes: list[str]) -> None:
    """A run that goes on with other classes in as many outputs would not be noticed anywhere else."""
    if not best.exists():
        return
    before = json.loads(read_metadata(best).get("classes", "null"))
    if before is not None and before != classes:
        differing = [name for name in [*before, *classes] if (name in before) != (name in classes)] or classes
        raise ValueError(
            f"{best.parent} was trained on other classes ({differing[0]!r} is not in both): resume with the same data"
        )


def _report(summary: dict[str, object], out: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    numbers = " ".join(f"{name} {summary[name]:.2f}" for name in ("top1", "top5", "loss") if name in summary)
    print(f"{numbers}; best.safetensors, curve.png and summary.json are in {out}")
