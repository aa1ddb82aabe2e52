# SPDX-License-Identifier: Apache-2.0
"""Runs a study in a folder: what is finished is kept, what was interrupted goes on, what another process does is left.

    FOLDER/runs/KEY/          a run's folder while it trains, and its claims
    FOLDER/results/KEY.json   a finished run; it appears whole or not at all
    FOLDER/NAME/              the study's page, with its plan and results in results.json

KEY follows from everything that determines a run, so that studies share runs (Fig. 5 has two stacks of Table 1).
"""

import hashlib
import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sola_vision.analysis.cost import count
from sola_vision.backbone import SolaVision
from sola_vision.config import SolaConfig
from sola_vision.data import ImageConfig
from sola_vision.engine import TrainConfig, distributed, fit
from sola_vision.engine.distributed import on_main
from sola_vision.tasks import Classification, ModelConfig, metadata

from .changes import CHANGES
from .claims import claimed
from .definition import Arm, Study
from .images import Images
from .scales import Scale

Say = Callable[[str], None]

# fields of TrainConfig that do not change what a run ends with
_FREE = ("device", "workers", "save_seconds", "save_steps", "log_every")


@dataclass(frozen=True)
class Run:
    """One training: an arm of a study, and a seed."""

    arm: str
    seed: int
    config: SolaConfig
    change: str
    train: TrainConfig
    images: ImageConfig | None
    identity: dict[str, Any]

    @property
    def definition(self) -> dict[str, Any]:
        """Everything that determines the result."""
        train = {name: value for name, value in asdict(self.train).items() if name not in _FREE}
        images = "crop and flip" if self.images is None else asdict(self.images)
        network = {**asdict(self.config), "change": self.change}
        # lists for tuples, as it will be read again
        return json.loads(json.dumps({"network": network, "train": train, "images": images, "data": self.identity}))

    @property
    def key(self) -> str:
        identity = {name: value for name, value in self.identity.items() if name != "name"}
        text = json.dumps({**self.definition, "data": identity}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def build(self, device: str | None = None) -> SolaVision:
        model = SolaVision(self.config, device=device)
        if self.change:
            CHANGES[self.change](model)
        return model


@dataclass(frozen=True)
class Plan:
    """A study at a scale on some images: its runs, seeds outermost, so that every arm has as many at any time."""

    study: Study
    scale: Scale
    images: Images
    seeds: int
    epochs: int
    train: TrainConfig
    runs: tuple[Run, ...]

    @cached_property
    def description(self) -> dict[str, Any]:
        """What results.json keeps of the plan; the costs of all arms are counted for it."""
        study, scale = self.study, self.scale
        size = study.cost_size if scale.name == "paper" else scale.size
        return {
            "name": study.name,
            "scale": scale.name,
            "what": scale.what,
            "data": self.images.describe(),
            "epochs": self.epochs,
            "batch_size": self.train.batch_size,
            "steps": self.epochs * (self.images.identity.train // self.train.batch_size),
            "lr": self.train.lr,
            "size": scale.size,
            "cost_size": size,
            "seeds": self.seeds,
            "arms": {
                arm.name: {"schedule": arm.schedule, "bridges": arm.bridges, **_cost(run, size)}
                for arm, run in zip(study.arms, self.runs, strict=False)
            },
            "keys": {run.key: [run.arm, run.seed] for run in self.runs},
        }


def plan(
    study: Study,
    scale: Scale,
    data: str,
    *,
    class_file: str | None = None,
    seeds: int | None = None,
    epochs: int | None = None,
    limit: int | None = None,
    device: str = "auto",
) -> Plan:
    """Checks everything that can be wrong before anything runs. Values that are None are the scale's or the study's."""
    if study.task != "classification":
        raise ValueError(f"{study.name} trains {study.task}, which studies cannot do yet: choose another study")
    base = scale.hierarchical if study.network == "hierarchical" else scale.isotropic
    epochs = epochs or scale.epochs.get(study.network, study.epochs)
    limit = limit or scale.limit
    images = Images(data, scale.size, scale.images, limit, class_file)
    number = seeds or scale.seeds
    train = replace(scale.train, epochs=epochs, device=device)
    if train.warmup_epochs >= epochs:
        train = replace(train, warmup_epochs=epochs / 10)
    if images.identity.train < train.batch_size:
        raise ValueError(
            f"{data}: {images.identity.train} training images are fewer than one batch of {train.batch_size}: "
            "give more images"
        )
    configs = {arm.name: _config(base, arm, images.identity.classes) for arm in study.arms}
    runs = tuple(
        Run(arm.name, seed, configs[arm.name], arm.change, replace(train, seed=seed), scale.images, images.describe())
        for seed in range(number)
        for arm in study.arms
    )
    return Plan(study, scale, images, number, epochs, train, runs)


def _config(base: SolaConfig, arm: Arm, classes: int) -> SolaConfig:
    stages = len(arm.schedule.split("/"))
    if stages != len(base.dims):
        raise ValueError(
            f"schedule {arm.schedule!r} has {stages} stages but the scale's network has {len(base.dims)}: give one "
            "group of letters for each stage, with a slash between them"
        )
    return base.with_changes(
        schedule=arm.schedule, bridges=arm.bridges, token_shift=arm.token_shift, num_classes=classes
    )


def _cost(run: Run, size: int) -> dict[str, int]:
    """Parameters with the head, MACs of one image without it, as the paper counts."""
    cost = count(run.build("meta").eval(), (size, size))
    head = sum(row.macs for row in cost.rows if row.module.startswith("head"))
    return {"parameters": cost.parameters, "macs": cost.macs - head}


def run_plan(plan: Plan, folder: Path, say: Say) -> int:
    """Does what is left to do; returns how many runs other processes are doing. Under torchrun all call it."""
    busy = 0
    with distributed(plan.runs[0].train.device) as world:
        for number, run in enumerate(plan.runs):
            with _mine(run, folder) as state:
                busy += state == "busy"
                if state == "free":
                    if world.is_main:
                        say(f"{plan.study.name} {number + 1} of {len(plan.runs)}: {run.arm}, seed {run.seed}")
                    result = _train(run, plan.images, folder)
                    on_main(lambda run=run, result=result: _store(run, result, folder))  # type: ignore[misc]
    return busy


@contextmanager
def _mine(run: Run, folder: Path) -> Iterator[str]:
    """Claims a run, on the first process, and tells all of them: "finished", "busy" (someone else's) or "free"."""
    result = folder / "results" / f"{run.key}.json"
    with ExitStack() as stack:

        def take() -> str:
            if result.exists():
                return "finished"
            free = stack.enter_context(claimed(folder / "runs" / run.key))
            # it may have been finished between the two looks
            return "finished" if result.exists() else "free" if free else "busy"

        yield on_main(take)


def _train(run: Run, images: Images, folder: Path) -> dict[str, Any]:
    out = folder / "runs" / run.key
    torch.manual_seed(run.seed)  # of the initial weights
    model = run.build()
    classes = images.identity.classes
    task = Classification(classes, images.settings)
    named = metadata("classification", ModelConfig(name="sola_tiny"), images.settings, images.classes, model)
    begun = (out / "metrics.jsonl").exists()
    return fit(
        task,
        model,
        images.train,
        images.val,
        run.train,
        out,
        resume=begun,
        # a changed network has other weights than its schedule tells: sola eval could not load it
        metadata=None if run.change else named,
    )


def _store(run: Run, summary: dict[str, Any], folder: Path) -> None:
    out = folder / "runs" / run.key
    speeds = [
        record["images_per_second"]
        for line in (out / "metrics.jsonl").read_text().splitlines()
        if (record := json.loads(line))["kind"] == "train" and record.get("images_per_second")
    ]
    kept = ("hardware", "processes", "threads", "python", "torch", "timm", "commit", "command", "peak_memory_mib")
    result: dict[str, Any] = {
        "key": run.key,
        "seed": run.seed,
        **run.definition,
        **{name: round(summary[name], 4) for name in ("top1", "top5", "loss") if name in summary},
        "images_per_second": round(statistics.median(speeds), 1) if speeds else None,
        "seconds": summary["seconds"],
        "steps": summary["steps"],
        **{name: summary.get(name) for name in kept},
    }
    # results are published, and where folders lie on somebody's machine is nobody's business
    words = str(summary.get("command", "")).split(" ")
    result["command"] = " ".join(Path(word).name if Path(word).is_absolute() else word for word in words)
    path = folder / "results" / f"{run.key}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, result)
    # nobody will resume a finished run; its weights stay
    shutil.rmtree(out / "last", ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Replaced at once or not at all, and nothing of it lost when the power goes."""
    beside = path.with_name(f".{path.name}-{os.getpid()}")
    with beside.open("w") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def stored(folder: Path, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The finished runs among `keys`."""
    for key in keys:
        path = folder / "results" / f"{key}.json"
        if path.exists():
            yield json.loads(path.read_text())
