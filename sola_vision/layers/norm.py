# SPDX-License-Identifier: Apache-2.0
"""The layer norm outside of linear layers, whose own norms are fused with what follows them."""

from torch import Tensor, nn

from sola_vision.layers.dispatch import in_eager_mode_on_gpu, operands_agree
from sola_vision.layers.fused_gpu import layer_norm
from sola_vision.layers.unmodified import has_plain_parameters


class LayerNorm(nn.LayerNorm):
    """torch's layer norm, in eager mode on a GPU by a kernel that reads half precision under autocast, instead of after
    a conversion, and processes several tokens at a time. torch's takes one block of threads for each and was the
    largest item of a small network's profile (docs/log.md).
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> the same shape."""
        if (
            in_eager_mode_on_gpu(x)
            and has_plain_parameters(self)
            and x.shape[-1:] == self.normalized_shape
            and operands_agree(x, self.weight, self.bias)
        ):
            return layer_norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)
