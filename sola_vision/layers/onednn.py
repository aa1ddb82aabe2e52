# SPDX-License-Identifier: Apache-2.0
"""oneDNN's products with what follows them in the same pass, for inference on a CPU: a linear layer with its bias in
bfloat16, where torch first copies the bias to every row of the result, and a convolution with its GELU.

These are torch's operators for Inductor. In eager mode torch has no public way to them (docs/performance-layers.md).
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn.functional import conv2d, gelu

from sola_vision.layers.dispatch import in_eager_inference_on_cpu
from sola_vision.layers.products import project
from sola_vision.layers.unmodified import is_stock, is_unhooked

_DTYPES = (torch.float32, torch.bfloat16)  # float16 was not measured


def project_biased(x: Tensor, projection: nn.Linear) -> Tensor:
    """projection(x): [..., K] -> [..., D]."""
    fits = type(x) is Tensor and x.dtype == torch.bfloat16 and is_stock(projection)  # not a torch.fx proxy
    if not fits or not _takes(x, projection.weight, projection.bias) or x.shape[-1] != projection.in_features:
        return project(x, projection)
    return torch.ops.mkldnn._linear_pointwise(x, projection.weight, projection.bias, "none", [], "")


def convolve_gelu(x: Tensor, convolution: nn.Conv2d) -> Tensor:
    """gelu(convolution(x)): [B, C, H, W] -> [B, D, H, W]."""
    c = convolution
    if is_unhooked(c, nn.Conv2d) and c.padding_mode == "zeros" and not isinstance(c.padding, str):
        if isinstance(x, torch.fx.Proxy):
            return _convolve_gelu(x, c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups)
        if _takes_image(x, c.weight, c.bias, c.groups):
            return _fused(x, c.weight, c.bias, c.stride, c.padding, c.dilation, c.groups)
    return gelu(c(x))


_Sizes = tuple[int, ...]


@torch.fx.wrap  # one node of a graph by torch.fx, which decides as the network does when it runs
def _convolve_gelu(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: _Sizes, padding: _Sizes, dilation: _Sizes, groups: int
) -> Tensor:
    if _takes_image(x, weight, bias, groups):
        return _fused(x, weight, bias, stride, padding, dilation, groups)
    return gelu(conv2d(x, weight, bias, stride, padding, dilation, groups))


def _fused(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: _Sizes, padding: _Sizes, dilation: _Sizes, groups: int
) -> Tensor:
    return torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, padding, stride, dilation, groups, "gelu", [], "none"
    )


def _takes_image(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> bool:
    usual = type(x) is Tensor and x.dtype in _DTYPES
    return usual and _takes(x, weight, bias) and x.shape[1] == groups * weight.shape[1]


def _takes(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        bias is not None
        and in_eager_inference_on_cpu(x)
        and all(type(p) in (nn.Parameter, Tensor) and p.dtype == x.dtype and p.is_cpu for p in (weight, bias))
        # oneDNN reads a bias as it lies in memory
        and bias.is_contiguous()
        and bias.shape == weight.shape[:1]
        and x.numel() > 0
        and bool(torch.backends.mkldnn.enabled)
        and _is_built(x.dtype)
        # dispatch modes, such as FlopCounterMode, and make_fx know torch's public operators
        and not torch._C._len_torch_dispatch_stack()
        and get_proxy_mode() is None
    )


@cache
def _is_built(dtype: torch.dtype) -> bool:
    """True if this torch has the operators, and the processor AVX-512, with which they were measured."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_convolution_pointwise"))
