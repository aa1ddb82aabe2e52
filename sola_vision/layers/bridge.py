# SPDX-License-Identifier: Apache-2.0
"""The Hidden State Bridge (eq. 10): a linear layer's state, sampled at a deeper grid, refines a softmax layer's input.

X_bridge = sample(H) W_hsb,    x <- x + sigmoid(x W_g) * X_bridge
"""

import torch
from torch import Tensor, nn

from sola_vision.layers.products import project


def sample(state: Tensor, height: int, width: int) -> Tensor:
    """Pick equidistant tokens: [B, H_s, W_s, C] -> [B, height, width, C], without parameters."""
    # not in the paper: eq. 10's Samp is "parameter-free, equidistant"; along each axis the source token at the
    # target token's centre is taken, floor((i + 0.5) * source / target). Its xi_eff, an interaction range whose role is
    # not stated, is left out: the two grids determine the distance of the samples
    rows = _centres(state.shape[1], height, state.device)
    columns = _centres(state.shape[2], width, state.device)
    return state.index_select(1, rows).index_select(2, columns)


def _centres(source: int, target: int, device: torch.device) -> Tensor:
    # in integers: (2 i + 1) * source / (2 target), rounded down
    return (torch.arange(target, device=device) * 2 + 1) * source // (2 * target)


class HiddenStateBridge(nn.Module):
    """One bridge; its output is added to the target layer's input."""

    # not in the paper: H is the WKV read-out before the receptance gate. Eqs. 3-4 speak of the hidden state, whose
    # normalised read-out exists for every token at linear cost. The projections have no bias.

    def __init__(
        self, source_dim: int, dim: int, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.proj = nn.Linear(source_dim, dim, bias=False, device=device, dtype=dtype)
        self.gate = nn.Linear(dim, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """x [B, H, W, C] and the source's state [B, H_s, W_s, C_s] -> the refinement [B, H, W, C]."""
        sampled = sample(state, x.shape[1], x.shape[2])
        return torch.sigmoid(project(x, self.gate)) * project(sampled, self.proj)
