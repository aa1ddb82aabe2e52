# SPDX-License-Identifier: Apache-2.0
"""Which implementation computes a linear layer. They agree to rounding; the first that applies is taken:

one node   each half of the layer is one autograd node that launches Triton kernels (`fused_gpu.py`): eager, CUDA
tiles      matrix products fused with the passes around them, a tile of tokens at a time (`ops/linear.py`): CPU kernel
bands      inference on a CPU where tiles do not pay, in bands of rows that stay in the cache (`bands.py`)
recompute  training on a CPU: passes are recomputed in the backward instead of kept (`projections.py`)
plain      torch's operators one after the other: compilers, tracers, exporters, pinned paths, modified modules
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from sola_vision import ops
from sola_vision.layers.products import matrices_stay_narrow
from sola_vision.layers.unmodified import has_global_hook, is_unmodified, parameter
from sola_vision.ops import cpu
from sola_vision.ops.autocast import autocasts
from sola_vision.ops.path import exporting


def in_one_node(x: Tensor, norm: nn.LayerNorm, *projections: nn.Linear) -> bool:
    """True if a half of a layer, applied to x [B, H, W, C], can run as one autograd node on a GPU."""
    return (
        in_eager_mode_on_gpu(x)
        and is_unmodified(norm, *projections)
        and not has_global_hook()
        and operands_agree(x, *(projection.weight for projection in projections))
    )


def in_eager_mode_on_gpu(x: Tensor) -> bool:
    """True if an autograd node may launch Triton kernels on x [..., C], which no compiler, tracer or transform sees."""
    return (
        not (torch.compiler.is_compiling() or torch.jit.is_tracing())  # first: compilers cannot trace the rest
        and type(x) is Tensor
        and x.is_cuda
        and x.dtype != torch.float64  # the kernels compute in float32
        and ops.missing_kernel("cuda") is None
        and ops.pinned() in (None, "native")
        and not (ops.seen_through(x) or ops.tangents())
        # dispatch modes, such as those of make_fx and of FlopCounterMode, see operators, but not launches
        and not torch._C._len_torch_dispatch_stack()
    )


def operands_agree(x: Tensor, *others: Tensor) -> bool:
    """True if x on a GPU and others, such as parameters, have one device and, without autocast, one dtype; torch's
    operators raise the error otherwise.
    """
    device, autocast = x.get_device(), torch.is_autocast_enabled(x.device.type)
    return all(other.get_device() == device and (autocast or other.dtype == x.dtype) for other in others)


def in_tiles(x: Tensor, *modules: nn.Module) -> bool:
    """True if the CPU kernel can apply these norms and projections to x [..., C] in tiles of tokens."""
    # exported graphs have to run on any processor
    if exporting() or not _inference_on_cpu(x, *modules):
        return False
    return multiplied_in_tiles(x, *(parameter(module, "weight") for module in modules if type(module) is nn.Linear))


def in_bands(x: Tensor, *modules: nn.Module) -> bool:
    """True if these norms and projections may process x [B, H, W, C] in bands; compilers prefer few large steps."""
    return in_eager_inference_on_cpu(x) and is_unmodified(*modules)


def in_eager_inference_on_cpu(x: Tensor) -> bool:
    """True if x is part of a forward on a CPU that neither autograd nor a compiler, tracer or transform sees."""
    return not torch.compiler.is_compiling() and _inference_on_cpu(x)


def _inference_on_cpu(x: Tensor, *modules: nn.Module) -> bool:
    """True for plain inference on a CPU. Training needs the intermediates, pinned paths and modified modules need the
    plain form, and a tracer would not record what is written into a band.
    """
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and ops.pinned() in (None, "native")
        and not (torch.jit.is_tracing() or ops.seen_through(x) or ops.tangents())
        and not has_global_hook()
        and is_unmodified(*modules)
    )


def recomputed(x: Tensor, projections: Sequence[nn.Linear], *tensors: Tensor) -> bool:
    """True if a pass over x, before these projections, should be recomputed in the backward. tensors: its other inputs.

    On a GPU the host's time for one more launch counts more than the memory; compilers decide this themselves.
    """
    if x.is_cuda or not torch.is_grad_enabled() or ops.pinned() not in (None, "native"):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not is_unmodified(*projections):
        return False
    # make_fx would record products written into slices, which autograd refuses when the graph runs
    if get_proxy_mode() is not None:
        return False
    weights = [projection.weight for projection in projections]
    # only autocast converts weights of another dtype; without it `linear` raises the error
    if not (autocasts(x) and x.dtype != torch.float64) and any(weight.dtype != x.dtype for weight in weights):
        return False
    return not ops.seen_through(x, *tensors, *weights)


def multiplied_in_tiles(x: Tensor, *others: Tensor) -> bool:
    """True if the CPU kernel multiplies x [..., C], and tensors like it, by weights of these dtypes, and x has enough
    tokens to pay for packing the weights.
    """
    return (
        x.device.type == "cpu"
        and cpu.multiplies(x.dtype)
        and x.numel() >= _tokens_per_square(x.dtype) * x.shape[-1] ** 3
        and all(other.dtype == x.dtype for other in others)
        and not torch.is_autocast_enabled("cpu")
    )


@torch.compiler.assume_constant_result
def _tokens_per_square(dtype: torch.dtype) -> float:
    """The number of tokens per squared channel from which tiles are faster (benchmarks/tiles.py): with few tokens the
    packing of the weights dominates, and with many channels torch's libraries are more efficient.
    """
    used = cpu.instruction_set()
    if dtype == torch.bfloat16:
        return 1 / 1400 if used == "amx" else 1 / 600
    return 1 / 3100 if used != "avx2" and matrices_stay_narrow() else 1 / 350
