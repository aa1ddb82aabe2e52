# SPDX-License-Identifier: Apache-2.0
"""The optimiser, its learning rate as a function of the step, and the moving average of the weights.

Parameter groups (no decay for biases, norms and `no_weight_decay()`; layer-wise decay by `group_matcher()`) are
timm's. The schedule has no state: resuming needs the step and nothing else.
"""

import math

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    if config.optimizer not in list_optimizers():
        raise ValueError(f"optimizer={config.optimizer!r} is not one of timm's; adamw, sgd and lamb are among them")
    if config.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise ValueError(
            f"layer_decay={config.layer_decay} needs a model with group_matcher(), which {type(model).__name__} lacks"
        )
    try:
        _try(config.optimizer, next(model.parameters()).device)
        return create_optimizer_v2(
            model,
            opt=config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
        )
    except (AssertionError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"optimizer={config.optimizer!r} cannot train here ({reason}); adamw, sgd and lamb can"
        ) from None


def _try(name: str, device: torch.device) -> None:
    """One step on a toy: some optimisers want more than gradients, or keep what a checkpoint cannot hold."""
    toy = nn.Parameter(torch.ones(2, 2, device=device))
    toy.grad = torch.ones_like(toy)
    optimizer = create_optimizer_v2([toy], opt=name, lr=1e-3)
    optimizer.step()
    for key, value in optimizer.state[toy].items():
        if not isinstance(value, Tensor | bool | int | float | None):
            raise TypeError(f"a checkpoint cannot hold the {type(value).__name__} {key} that it keeps")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def count_steps(config: TrainConfig, epoch_steps: int) -> int:
    """Optimiser steps of the whole run; refuses a warm-up that does not fit into it."""
    total = config.steps or config.epochs * epoch_steps
    warmup = _warmup(config, epoch_steps)
    if warmup >= total:
        raise ValueError(
            f"the warm-up of {warmup} steps is not shorter than the run of {total}: lower warmup_epochs or warmup_steps"
        )
    return total


def lr_at(step: int, config: TrainConfig, epoch_steps: int, total: int) -> float:
    """Learning rate of a step in [0, total): linear warm-up, then the schedule from lr towards min_lr."""
    warmup = _warmup(config, epoch_steps)
    if step < warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / warmup
    if config.schedule == "multistep":
        passed = sum(step >= milestone * epoch_steps for milestone in config.milestones)
        return config.lr * 0.1**passed
    # not in the paper: whether the schedule counts from the first step or from the warm-up's end; this has no jump
    done = (step - warmup) / (total - warmup)
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_lr + (config.lr - config.min_lr) * left


def _warmup(config: TrainConfig, epoch_steps: int) -> int:
    return round(config.warmup_epochs * epoch_steps) if config.warmup_steps is None else config.warmup_steps


class Ema:
    """Moving average of weights and float buffers, in a module of its own; works on shards as well."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        # not in the paper: early on a shorter memory, or the initial weights would outlive a short run
        decay = min(self.decay, (1 + step) / (10 + step))
        floats: tuple[list[Tensor], list[Tensor]] = ([], [])
        for mine, theirs in zip(_tensors(self.module), _tensors(model), strict=True):
            if mine.is_floating_point():
                floats[0].append(mine)
                floats[1].append(theirs)
            else:
                mine.copy_(theirs)
        torch._foreach_lerp_(floats[0], floats[1], 1 - decay)


def _tensors(module: nn.Module) -> list[Tensor]:
    tensors = [*module.parameters(), *module.buffers()]
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
