# SPDX-License-Identifier: Apache-2.0
"""The state of a run: everything that the training loop uses, created new or restored from the run's folder."""

import copy
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import Dataset

from . import checkpoint, loading, optim, resuming
from .checkpoint import Progress
from .config import Task, TrainConfig
from .distributed import World, copy_from_main, on_main, parallel, set_precision
from .loading import Collate, EvaluationBatches
from .log import Log
from .reports import Reports


class Sets(NamedTuple):
    """The datasets and their collate functions (None: torch's default_collate)."""

    train: Dataset[Any]
    val: Dataset[Any]
    collate: Collate | None = None
    eval_collate: Collate | None = None


@dataclass
class Run:
    """The objects and counters shared by the functions of the loop."""

    task: Task
    config: TrainConfig
    folder: Path
    world: World
    epoch_steps: int
    total: int
    model: nn.Module
    trained: nn.Module  # the model, possibly wrapped in DDP
    ema: optim.Ema | None
    modules: dict[str, nn.Module]  # saved in the resumable state
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    batches: Generator[Any, None, None]
    held_out: EvaluationBatches
    skipped: loading.Skipped
    progress: Progress
    log: Log
    reports: Reports
    metadata: Mapping[str, str] = field(default_factory=dict)  # of the best weights
    kept: str = ""  # the submodule whose weights are saved as best
    began: float = field(default_factory=time.monotonic)
    saved: float = field(default_factory=time.monotonic)
    saved_step: int | None = None
    logged: tuple[int, float] = (0, 0.0)  # step and time of the last training record
    grad_norm: float = 0.0
    stop: bool = False
    save: bool = False

    @property
    def epoch(self) -> float:
        """The number of epochs trained so far."""
        return self.progress.step / self.epoch_steps

    @property
    def best_model(self) -> nn.Module:
        """The model that is evaluated and saved as best: the moving average if enabled."""
        return self.model if self.ema is None else self.ema.module

    def close(self) -> None:
        """Shut down the workers and close the log."""
        self.batches.close()
        self.held_out.close()
        self.log.close()


def prepare(
    task: Task,
    model: nn.Module,
    sets: Sets,
    config: TrainConfig,
    folder: Path,
    world: World,
    *,
    resume: bool,
    begin: Callable[[], None] | None,
) -> Run:
    """Create the run that `fit` trains; with `resume` restore it from the last checkpoint of its folder.

    Nothing is written before all checks have passed; `begin` is called first, then the log is opened.
    """
    # torch's Dataset does not declare __len__
    images = {"training": len(sets.train), "evaluation": len(sets.val)}  # type: ignore[arg-type]
    epoch_steps = loading.count_epoch_steps(images["training"], config)
    total = optim.count_steps(config, epoch_steps)
    micro_batch = loading.micro_batch_size(config, world)
    set_precision(world.device)

    model, trained, average = _place(model, config, world)
    modules = {"model": model} | ({} if average is None else {"ema": average})
    optimizer = optim.make_optimizer(model, config)
    scaler = torch.amp.GradScaler(world.device.type, enabled=config.amp == "fp16")
    saved = on_main(lambda: resuming.resumable_progress(folder, config, total)) if resume else None
    if saved is not None:
        checkpoint.load_state(folder, modules, optimizer)
        if saved.scaler:  # none without fp16
            scaler.load_state_dict(saved.scaler)
    if begin is not None:
        on_main(begin)

    progress = saved or Progress()
    # opened only after all checks, because it cuts off records newer than the state
    log = Log(folder, main=world.is_main, total=total, step=progress.step, keep=progress.metrics_bytes)
    known = resuming.known_failures(progress, images)
    skipped = loading.Skipped("training", images["training"], config.max_corrupt, known.get("training"))
    held_out = EvaluationBatches(
        sets.val,
        world,
        batch_size=micro_batch,
        workers=config.workers,
        seed=config.seed,
        max_corrupt=config.max_corrupt,
        collate=sets.eval_collate or sets.collate,
        known=known.get("evaluation"),
    )
    if saved is not None:
        if changed := resuming.changes(progress, config, images):
            log.info(f"the run continues with another configuration: {', '.join(changed)}")
        log.info(f"resuming {folder} at step {progress.step} of {total}")
    elif resume:
        log.info(f"{folder} has no checkpoint yet: starting from the beginning")
    progress.config, progress.images = asdict(config), images
    return Run(
        task=task,
        config=config,
        folder=folder,
        world=world,
        epoch_steps=epoch_steps,
        total=total,
        model=model,
        trained=trained,
        ema=None if average is None else optim.Ema(average, config.ema),
        modules=modules,
        optimizer=optimizer,
        scaler=scaler,
        batches=loading.training_batches(sets.train, config, world, progress.step, total, skipped, sets.collate),
        held_out=held_out,
        skipped=skipped,
        progress=progress,
        log=log,
        reports=Reports(world.device),
        saved_step=None if saved is None else progress.step,
    )


def _place(model: nn.Module, config: TrainConfig, world: World) -> tuple[nn.Module, nn.Module, nn.Module | None]:
    """Move the model to the device; return it, the module to call in training, and its moving average or None."""
    model = model.to(world.device)
    if world.size > 1 and world.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # torch has no SyncBatchNorm for the CPU
    copy_from_main(model.state_dict().values())
    average = copy.deepcopy(model).eval().requires_grad_(False) if config.ema else None
    if config.compile:
        for module in (model, average):
            if module is not None:
                module.compile()  # in place, so checkpoint keys do not change
    trained = parallel(model, config.strategy, world)
    if average is not None and config.strategy == "fsdp":
        parallel(average, config.strategy, world)
    return model, trained, average
