# SPDX-License-Identifier: Apache-2.0
"""Matrix products of tokens and weights by the faster of torch's two CPU libraries. (Products fused with passes are in
`projections.py`.)

torch multiplies float32 matrices with MKL, which uses AVX2 only on AMD processors, and convolves with oneDNN, which
uses AVX-512. On such a processor the same product written as a 1x1 convolution is twice as fast
(docs/performance-layers.md). Everywhere else, and in half precision, where torch multiplies with oneDNN too, `linear`
is used.
"""

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from torch.nn.grad import conv2d_weight

from sola_vision.layers.unmodified import has_global_hook, is_stock
from sola_vision.ops import pinned, seen_through

_FEWEST_VALUES = 1 << 15  # torch passes smaller convolutions to another library
_FEWEST_ROWS = 128  # with fewer, oneDNN's reordering of the weight dominates
_DILATION = (2, 2)  # no effect on a 1x1 kernel, but keeps torch from passing it to MKL on one thread
# AMD's processor family. Earlier ones split AVX-512 into halves, and oneDNN gains nothing over MKL there (benchmarks/
# results/zen4/products.json). The same may hold for mobile processors of this family, which were not measured.
_ZEN_5 = 26


def project(x: Tensor, projection: nn.Linear) -> Tensor:
    """projection(x): [..., K] -> [..., D]."""
    convolves = (
        type(x) is Tensor  # not a torch.fx proxy
        and is_stock(projection)
        and _convolves(x, projection.weight)
        and x.shape[-1] == projection.in_features
        and not has_global_hook()
        and pinned() in (None, "native")
        and not seen_through(x)
    )
    if not convolves:
        return projection(x)
    return _convolve(x, projection.weight, projection.bias)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T: [..., K], [D, K] -> [..., D]."""
    return _convolve(x, weight) if _convolves(x, weight) else linear(x, weight)


def product_into(out: Tensor, rows: Tensor, weight: Tensor) -> None:
    """out [M, D] = rows [M, K] @ weight.T."""
    if _convolves(rows, weight):
        out.copy_(_convolve(rows, weight))
    else:
        torch.mm(rows, weight.t(), out=out)


def weight_gradient(grad: Tensor, rows: Tensor) -> Tensor:
    """grad.T @ rows: the gradient of a product [M, D] and its input [M, K] -> the gradient of the weight [D, K]."""
    if not _convolves(rows, grad):
        return grad.t() @ rows
    if rows.shape[1] > grad.shape[1]:  # oneDNN is faster if the output is the wider side
        return weight_gradient(rows, grad).t()
    shape = (grad.shape[1], rows.shape[1], 1, 1)
    return conv2d_weight(_image(rows), shape, _image(grad), dilation=_DILATION).flatten(1)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    made = conv2d(_image(x), weight[:, :, None, None], bias, dilation=_DILATION).permute(0, 2, 3, 1)
    # autograd must not treat it as a view, so that it may be modified in place
    return torch.ops.aten._unsafe_view(made, (*x.shape[:-1], weight.shape[0]))


def _image(x: Tensor) -> Tensor:
    """[..., K] as a one-column image [1, K, M, 1], channels last in memory like x."""
    return x.contiguous().view(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


def _convolves(x: Tensor, other: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and _convolution_is_faster()
        and not torch.jit.is_tracing()  # a traced file has to run on any processor
        and x.device.type == other.device.type == "cpu"
        and x.dtype == other.dtype == torch.float32
        and x.numel() >= max(_FEWEST_VALUES, _FEWEST_ROWS * x.shape[-1])
        and other.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and bool(torch.backends.mkldnn.enabled)
    )


@cache
def _convolution_is_faster() -> bool:
    return torch.backends.mkldnn.is_available() and _mkl_is_narrow() and _processor()[1] >= _ZEN_5


def matrices_stay_narrow() -> bool:
    """True if torch multiplies float32 matrices with AVX2 although the processor has AVX-512."""
    return _mkl_is_narrow() and not _convolution_is_faster()


def _mkl_is_narrow() -> bool:
    amd = _processor()[0] == "AuthenticAMD"
    return amd and torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def _processor() -> tuple[str, int]:
    """Vendor and family of the processor, such as ("AuthenticAMD", 26); ("", 0) unless on Linux on x86-64."""
    file = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not file.exists():
        return "", 0
    lines = (line.split(":", 1) for line in file.read_text().split("\n\n")[0].splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in lines}
    family = fields.get("cpu family", "")
    return fields.get("vendor_id", ""), int(family) if family.isdigit() else 0
