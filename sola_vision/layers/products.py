# SPDX-License-Identifier: Apache-2.0
"""Matrix products of tokens by weights, by the faster of the two libraries that torch has on a CPU. (Those with passes
around them are the kernel's own where it can, see `projections.py`.)

torch multiplies float32 matrices with MKL, which on AMD's processors stays with AVX2, and convolves with oneDNN, which
takes the AVX-512 that is there. A 1x1 convolution is the same product, on such a processor twice as fast (docs/
performance.md). Everywhere else, and in half precision, where torch multiplies with oneDNN as well, it is `linear`.
"""

import platform
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear
from torch.nn.grad import conv2d_weight

from sola_vision.layers.plain import hooked_everywhere, is_untouched
from sola_vision.ops import pinned, seen_through

_FEWEST_VALUES = 1 << 15  # torch itself leaves small convolutions to another library
_FEWEST_ROWS = 128  # for fewer, oneDNN's rearranging of the weight is a large part
_DILATION = (2, 2)  # a 1x1 kernel knows no difference, but torch, which on one thread leaves plain ones to MKL, does
# AMD's family. Earlier ones with AVX-512 compute it in halves, with which oneDNN gains nothing over MKL (benchmarks/
# results/zen4/products.json), as mobile ones of this family may, which were not measured
_ZEN_5 = 26


def project(x: Tensor, projection: nn.Linear) -> Tensor:
    """projection(x): [..., K] -> [..., D]."""
    convolves = (
        type(x) is Tensor  # not what torch.fx traces with
        and is_untouched(projection)
        and _convolves(x, projection.weight)
        and x.shape[-1] == projection.in_features
        and not hooked_everywhere()
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
    """grad.T @ rows: of a product's result [M, D] and its rows [M, K] -> its weight's [D, K]."""
    if not _convolves(rows, grad):
        return grad.t() @ rows
    if rows.shape[1] > grad.shape[1]:  # oneDNN is faster where the results are the wider side
        return weight_gradient(rows, grad).t()
    shape = (grad.shape[1], rows.shape[1], 1, 1)
    return conv2d_weight(_image(rows), shape, _image(grad), dilation=_DILATION).flatten(1)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    made = conv2d(_image(x), weight[:, :, None, None], bias, dilation=_DILATION).permute(0, 2, 3, 1)
    # not a view in autograd's eyes, so that it may be changed in place
    return torch.ops.aten._unsafe_view(made, (*x.shape[:-1], weight.shape[0]))


def _image(x: Tensor) -> Tensor:
    """[..., K] as an image of one column [1, K, M, 1], channels last in memory as x is."""
    return x.contiguous().view(1, -1, 1, x.shape[-1]).permute(0, 3, 1, 2)


def _convolves(x: Tensor, other: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and _convolution_is_faster()
        and not torch.jit.is_tracing()  # a traced file is for any processor
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
    """Whether torch multiplies float32 matrices with AVX2 though there is AVX-512, and by no library that is faster."""
    return _mkl_is_narrow() and not _convolution_is_faster()


def _mkl_is_narrow() -> bool:
    amd = _processor()[0] == "AuthenticAMD"
    return amd and torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def _processor() -> tuple[str, int]:
    """Vendor and family: ("AuthenticAMD", 26); ("", 0) where this is not Linux on x86."""
    file = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not file.exists():
        return "", 0
    lines = (line.split(":", 1) for line in file.read_text().split("\n\n")[0].splitlines() if ":" in line)
    said = {name.strip(): value.strip() for name, value in lines}
    family = said.get("cpu family", "")
    return said.get("vendor_id", ""), int(family) if family.isdigit() else 0
