# SPDX-License-Identifier: Apache-2.0
"""The middle of a softmax layer's MLP for inference on a CPU: `sola::depthwise_gelu` is one pass over the hidden units
(`csrc/depthwise.cpp`), where torch takes one for the bias before it, one for the convolution and one for the GELU.

What it computes is its plain form here, the default kernel. It has no gradients, and no kernel on a GPU, where
`torch.compile` fuses as much.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula


def _depthwise_gelu(x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(convolution of x + offset), 3x3 and depth-wise: x [B, H, W, C], offset and bias [C], weight [C, 1, 3, 3]."""
    moved = (x + offset).permute(0, 3, 1, 2)
    made = nn.functional.conv2d(moved, weight, bias, padding=1, groups=x.shape[-1])
    return nn.functional.gelu(made).permute(0, 2, 3, 1).contiguous()


def _cost(x: Any, *_: Any, out_shape: Any = None) -> int:
    """Nine multiply-adds an element, of two operations each."""
    return 2 * 9 * math.prod(x)


def register(library: torch.library.Library) -> None:
    """Defines the operator with its plain form as default kernel."""
    library.define(
        "depthwise_gelu(Tensor x, Tensor offset, Tensor weight, Tensor bias) -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    library.impl("depthwise_gelu", _depthwise_gelu, "CompositeExplicitAutograd")
    torch.library.register_fake(
        "sola::depthwise_gelu",
        lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
        lib=library,
    )
    register_flop_formula(torch.ops.sola.depthwise_gelu)(_cost)
