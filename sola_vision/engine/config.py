# SPDX-License-Identifier: Apache-2.0
"""The inputs of a training run: its settings (`TrainConfig`) and the problem to train on (`Task`).

The loop depends on nothing else. The configuration is flat, so that every field is one command-line option. A task
is a loss, an evaluation and the name of the metric that selects the best checkpoint.
"""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

# settings that may change when a run is resumed, because they do not affect its result; study keys leave them out
FREE = {"device", "workers", "save_seconds", "save_steps", "log_every"}


def _cores() -> int:
    # a container or a scheduler may grant fewer cores than the machine has
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(kw_only=True)
class TrainConfig:
    """How to train: optimiser, schedule, precision, processes and bookkeeping. The defaults are Swin's on ImageNet.

    Args:
        epochs: passes over the training set.
        steps: optimiser steps of the whole run; overrides epochs.
        batch_size: images per step, over all processes and accumulated micro-batches.
        accumulate: micro-batches whose gradients are summed for one step.
        optimizer: a timm optimiser name, such as adamw, sgd or lamb.
        lr: peak learning rate.
        min_lr: learning rate at the end (schedules cosine and poly).
        weight_decay: not applied to vectors (biases, norms, and the decays, bonuses and token shift of linear layers)
            and the parameters that the model's no_weight_decay() lists.
        clip: maximum norm of the gradient; null = no clipping.
        layer_decay: factor on the learning rate from each layer to the one below; null = off.
        schedule: cosine, poly (linear to min_lr) or multistep (a tenth at each milestone).
        milestones: epochs at which multistep divides the learning rate by ten.
        warmup_epochs: epochs in which the learning rate rises linearly from warmup_lr.
        warmup_steps: the same in steps; overrides warmup_epochs.
        warmup_lr: learning rate of the first step of the warm-up.
        amp: autocast to bf16 or fp16 (the latter with loss scaling); none = float32.
        ema: decay of the moving average of the weights, which is then evaluated and saved as best; 0 = off.
        strategy: ddp (every process holds the full model) or fsdp (FSDP2: parameters are sharded).
        compile: run the model through torch.compile.
        device: auto (CUDA if available, else the CPU), or a torch device such as cpu or cuda.
        seed: seed of data order, augmentation, stochastic depth and mixing.
        workers: processes that load images, for each training process.
        evaluate_every: epochs between evaluations; the end of the run is always evaluated.
        save_seconds: seconds between checkpoints within an epoch (every evaluation saves one as well).
        save_steps: additionally save a checkpoint every save_steps steps; null = off.
        log_every: steps between training records, at most an epoch; each is the mean over the steps since the previous
            one.
        max_corrupt: share of a dataset's images that may be unreadable before the run stops (a single one is
            always allowed, unless this is 0).
    """

    epochs: int = 300
    steps: int | None = None
    batch_size: int = 1024
    accumulate: int = 1
    optimizer: str = "adamw"
    lr: float = 1e-3
    min_lr: float = 1e-5
    weight_decay: float = 0.05
    clip: float | None = 5.0
    layer_decay: float | None = None
    schedule: Literal["cosine", "poly", "multistep"] = "cosine"
    milestones: tuple[int, ...] = ()
    warmup_epochs: float = 20
    warmup_steps: int | None = None
    warmup_lr: float = 1e-6
    amp: Literal["none", "bf16", "fp16"] = "none"
    ema: float = 0.0
    strategy: Literal["ddp", "fsdp"] = "ddp"
    compile: bool = False
    device: str = "auto"
    seed: int = 0
    workers: int = field(default_factory=lambda: min(8, _cores()))
    evaluate_every: int = 1
    save_seconds: float = 600.0
    save_steps: int | None = None
    log_every: int = 50
    max_corrupt: float = 0.01

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "batch_size", "accumulate", "evaluate_every", "save_steps", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        for name in ("lr", "clip", "layer_decay"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be above 0 and finite")
        for name in ("min_lr", "weight_decay", "warmup_epochs", "warmup_steps", "warmup_lr", "workers"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value} must not be negative or infinite")
        if not self.save_seconds >= 0:  # infinity: only after evaluations
            raise ValueError(f"save_seconds={self.save_seconds} must not be negative")
        for name, choices in (
            ("schedule", ("cosine", "poly", "multistep")),
            ("amp", ("none", "bf16", "fp16")),
            ("strategy", ("ddp", "fsdp")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(choices)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema={self.ema} must lie in [0, 1)")
        if not 0 <= self.max_corrupt <= 1:
            raise ValueError(f"max_corrupt={self.max_corrupt} must lie in [0, 1]")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size={self.batch_size} must be a multiple of accumulate={self.accumulate}")
        if self.layer_decay is not None and self.layer_decay > 1:
            raise ValueError(f"layer_decay={self.layer_decay} must not be above 1: lower layers learn more slowly")
        if self.schedule == "multistep" and min(self.milestones, default=0) < 1:
            raise ValueError(
                f"milestones={self.milestones} must be the epochs, from 1 on, at which schedule='multistep' lowers the "
                "learning rate"
            )
        if self.schedule != "multistep" and self.min_lr > self.lr:
            raise ValueError(f"min_lr={self.min_lr}, the final learning rate, is above lr={self.lr}: lower it")


def list_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a readable line for each setting that changed since the run started and may affect its result."""
    changed = [key for key in now if key not in FREE and now[key] != before.get(key)]
    return [f"{key}={now[key]} (was {before.get(key)})" for key in changed]


class Task(Protocol):
    """A problem to train on. The best weights have the highest value of `metric`, a key of evaluate()'s result.

    A task may also have `printed`, a mapping from the metrics that are printed to their units, such as {"top1": "%"}.
    """

    metric: str

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar to minimise and its parts to log (the same keys in every step).

        The model must be called as `model(images)`, because DDP and FSDP attach their hooks to that call.
        """
        ...

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        """Return the metrics over all processes, the same on each; `batches` are this process's, on the device."""
        ...
