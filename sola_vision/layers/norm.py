# SPDX-License-Identifier: Apache-2.0
"""The layer norm outside of linear layers, whose own norms are fused with what follows them."""

import torch
from torch import Tensor, nn

from sola_vision.layers.dispatch import in_eager_inference_on_cpu, in_eager_mode_on_gpu, operands_agree
from sola_vision.layers.fused_gpu import layer_norm
from sola_vision.layers.unmodified import has_plain_parameters


class LayerNorm(nn.LayerNorm):
    """torch's layer norm, by a kernel of this package where that is faster.

    In eager mode on a GPU the kernel reads half precision under autocast, instead of after a conversion, and processes
    several tokens at a time. torch's takes one block of threads for each and was the largest item of a small network's
    profile (docs/log.md). In inference on a CPU in half precision torch's takes up to 2.9 times as long
    (docs/performance-layers.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> the same shape."""
        if in_eager_mode_on_gpu(x) and self._fits(x) and operands_agree(x, self.weight, self.bias):
            return layer_norm(x, self.weight, self.bias, self.eps)
        half = type(x) is Tensor and x.dtype in (torch.bfloat16, torch.float16)  # not a torch.fx proxy
        if half and in_eager_inference_on_cpu(x) and self._fits(x):
            return torch.ops.sola.layer_norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)

    def _fits(self, x: Tensor) -> bool:
        return has_plain_parameters(self) and x.shape[-1:] == self.normalized_shape
