# SPDX-License-Identifier: Apache-2.0
"""A residual branch with stochastic depth (drop path): x + factor * branch, with one random factor for each image."""

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from sola_vision.layers.dispatch import in_eager_mode_on_gpu, operands_agree
from sola_vision.layers.fused_gpu import residual_sum
from sola_vision.layers.unmodified import is_exactly


def add_branch(x: Tensor, branch: Tensor, drop_path: nn.Module) -> Tensor:
    """x + drop_path(branch), both [B, H, W, C]; in eager mode on a GPU by one kernel."""
    if (
        is_fusible(drop_path)
        and in_eager_mode_on_gpu(x)
        and in_eager_mode_on_gpu(branch)
        and x.shape == branch.shape
        and operands_agree(x, branch)
    ):
        return residual_sum(x, branch, drop_factors(drop_path, x))
    return x + drop_path(branch)


def is_fusible(drop_path: nn.Module) -> bool:
    """True for timm's DropPath or an nn.Identity that no hook observes: kernels may apply its factors instead."""
    kind = nn.Identity if type(drop_path) is nn.Identity else DropPath
    return is_exactly(drop_path, kind)


def drops_nothing(drop_path: nn.Module) -> bool:
    """True if a fusible module is the identity in this call."""
    return type(drop_path) is nn.Identity or not (drop_path.training and drop_path.drop_prob)


def drop_factors(drop_path: nn.Module, x: Tensor) -> Tensor | None:
    """The factors [B] that a fusible module would multiply the images of x [B, ...] by, or None if all are 1; drawn as
    timm's drop_path draws them, so that a seed drops the same images.
    """
    if drops_nothing(drop_path):
        return None
    assert isinstance(drop_path, DropPath)
    keep = 1 - drop_path.drop_prob
    factors = torch.empty(len(x), dtype=x.dtype, device=x.device).bernoulli_(keep)
    return factors.div_(keep) if keep > 0 and drop_path.scale_by_keep else factors
