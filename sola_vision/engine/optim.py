# SPDX-License-Identifier: Apache-2.0
"""The optimiser, its learning rate as a function of the step, and the moving average of the weights.

Parameter groups (no decay for biases, norms and `no_weight_decay()`; layer-wise decay by `group_matcher()`) are
timm's. The schedule has no state: resuming needs only the step.
"""

import math

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..wording import amount
from .config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return timm's optimizer for `config`; ValueError if it does not exist, cannot train or cannot be saved."""
    if config.optimizer not in list_optimizers():
        raise ValueError(f"optimizer={config.optimizer!r} is not a timm optimiser: use one such as adamw, sgd or lamb")
    if config.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise ValueError(
            f"layer_decay={config.layer_decay} needs a model with group_matcher(), which {type(model).__name__} lacks"
        )
    try:
        # one kernel for all parameters: a fifth of the time on a CPU, and fewer launches on a GPU
        kernel = {"fused": True} if _is_fused(config.optimizer) else {}
        _check_step(config.optimizer, next(model.parameters()).device)
        # not in the paper: timm leaves all vectors without weight decay; besides biases and norms, as in Swin, these
        # are decays, bonuses and the weights of the token shift
        return create_optimizer_v2(
            model,
            opt=config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            **kernel,
        )
    except (AssertionError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"optimizer={config.optimizer!r} cannot be used here ({reason}): use another, such as adamw, sgd or lamb"
        ) from None


def _is_fused(name: str) -> bool:
    """True for Adam and AdamW. The fused SGD of torch 2.14 fails under FSDP and for a parameter whose first gradient
    comes later, and starts from uninitialised momentum after a step that fp16's scaler has skipped.
    """
    return get_optimizer_class(name, bind_defaults=False) in (torch.optim.Adam, torch.optim.AdamW)


def _check_step(name: str, device: torch.device) -> None:
    """Take a step on a toy parameter; some optimisers need more than gradients or hold state that cannot be saved."""
    toy = nn.Parameter(torch.ones(2, 2, device=device))
    toy.grad = torch.ones_like(toy)
    optimizer = create_optimizer_v2([toy], opt=name, lr=1e-3)
    optimizer.step()
    for key, value in optimizer.state[toy].items():
        if not isinstance(value, Tensor | bool | int | float | None):
            raise TypeError(f"a checkpoint cannot hold its state {key} of type {type(value).__name__}")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group, times its layer-wise factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def count_steps(config: TrainConfig, epoch_steps: int) -> int:
    """Return the optimiser steps of the whole run; ValueError if the warm-up is not shorter."""
    total = config.steps or config.epochs * epoch_steps
    warmup = _warmup(config, epoch_steps)
    if warmup >= total:
        if config.warmup_steps is None:
            given, shorter = (
                f"warmup_epochs={config.warmup_epochs:g} ({amount(warmup, 'step')})",
                f"{total / epoch_steps / 10:.2g}",
            )
        else:
            given, shorter = f"warmup_steps={warmup}", str(total // 10)
        run = amount(total, "step")
        raise ValueError(f"{given} must be shorter than the run of {run}: lower it, for example to {shorter}")
    return total


def lr_at(step: int, config: TrainConfig, epoch_steps: int, total: int) -> float:
    """Return the learning rate of a step in [0, total): linear warm-up, then the schedule from lr to min_lr."""
    warmup = _warmup(config, epoch_steps)
    if step < warmup:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / warmup
    if config.schedule == "multistep":
        passed = sum(step >= milestone * epoch_steps for milestone in config.milestones)
        return config.lr * 0.1**passed
    # not in the paper: whether the schedule starts at step 0 or after the warm-up; the latter has no jump
    done = (step - warmup) / (total - warmup)
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_lr + (config.lr - config.min_lr) * left


def _warmup(config: TrainConfig, epoch_steps: int) -> int:
    return round(config.warmup_epochs * epoch_steps) if config.warmup_steps is None else config.warmup_steps


class Ema:
    """Exponential moving average of weights and float buffers, held in a copy of the model; also works on shards."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards the weights of `model`; buffers that are not floats are copied."""
        # not in the paper: a smaller decay in early steps, so that the initial weights do not dominate a short run
        decay = min(self.decay, (1 + step) / (10 + step))
        floats: tuple[list[Tensor], list[Tensor]] = ([], [])
        for average, current in zip(_tensors(self.module), _tensors(model), strict=True):
            if average.is_floating_point():
                floats[0].append(average)
                floats[1].append(current)
            else:
                average.copy_(current)
        torch._foreach_lerp_(floats[0], floats[1], 1 - decay)


def _tensors(module: nn.Module) -> list[Tensor]:
    tensors = [*module.parameters(), *module.buffers()]
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
