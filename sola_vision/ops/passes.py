# SPDX-License-Identifier: Apache-2.0
"""The element-wise passes around the operator: each reads and writes a value in memory once.

A pass is defined by its plain form in this file, the function of the same name with an underscore. For a pass that is
an operator it is the default kernel of `sola::NAME`, used by `ops.use("portable")` and fused by `torch.compile` on a
GPU. On a CPU the C++ kernel (`csrc/passes.cpp`) overrides it, on CUDA the Triton kernel (`gpu_passes.py`). The others
are called by autograd nodes on a GPU only (`layers/fused_gpu.py`). A backward needs only the inputs, and recomputes
everything else.
"""

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from sola_vision.ops import autocast
from sola_vision.ops.arguments import check_kind, check_same_shape, register_fake, size
from sola_vision.ops.path import pinned, seen_through


def norm_shift(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mixes: Tensor,
    *,
    top: int = 0,
    bottom: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return mix * n + (1 - mix) * quad_shift(n) with n the layer norm of x, for each row of mixes.

    x [B, H, W, C], weight and bias [C], mixes [M, C] -> [M, B, H - top - bottom, W, C]: `top` and `bottom` rows of x
    are only read as neighbours. `dtype` is that of the result, by default that of x.
    """
    _check_shift(x, weight, bias, mixes, top, bottom)
    if _use_plain_form(x, weight, bias, mixes):
        return _norm_shift(x, weight, bias, eps, mixes, top, bottom, dtype)
    operator = torch.ops.sola.norm_shift
    if dtype in (None, x.dtype):
        return operator.default(x, weight, bias, eps, mixes, top, bottom)
    return operator.dtype(x, weight, bias, eps, mixes, top, bottom, dtype)


def norm_shift_backward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mixes: Tensor, grad: Tensor, top: int, bottom: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `norm_shift` with respect to x, weight, bias and mixes, in the inputs' dtypes, given that
    of its result [M, B, H - top - bottom, W, C] in any dtype.
    """
    if top or bottom:  # F.pad copies even if it adds no rows
        grad = torch.nn.functional.pad(grad, (0, 0, 0, 0, top, bottom))
    return _backward("norm_shift")(x, weight, bias, eps, mixes, grad)


def gate(receptance: Tensor, value: Tensor) -> Tensor:
    """Return sigmoid(receptance) * value, both of the same shape."""
    check_same_shape("gate", receptance=receptance, value=value)
    if _use_plain_form(receptance, value) or _mixed_dtypes(receptance, value):
        return _gate(receptance, value)
    return torch.ops.sola.gate(receptance, value)


def gate_backward(receptance: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `gate` with respect to its arguments, without recording a graph."""
    if _mixed_dtypes(receptance, value, grad):
        return _gate_backward(receptance, value, grad)
    grads: tuple[Tensor, Tensor] = torch.ops.sola.gate_backward(receptance, value, grad)
    return grads


def gated_sum(residual: Tensor, receptance: Tensor, value: Tensor, out: Tensor | None = None) -> Tensor:
    """Return residual + sigmoid(receptance) * value, all of the same shape; written to `out` if given, which must be
    contiguous and of the promoted dtype. With `out` the result is not differentiable: raises RuntimeError if a tensor
    requires a gradient.
    """
    operands = {"residual": residual, "receptance": receptance, "value": value}
    check_same_shape("gated_sum", **operands, **({} if out is None else {"out": out}))
    plain = _use_plain_form(*operands.values()) or _mixed_dtypes(*operands.values())
    if out is None:
        return (_gated_sum if plain else torch.ops.sola.gated_sum)(residual, receptance, value)
    _check_out(out, *operands.values())
    if plain:
        return out.copy_(_gated_sum(residual, receptance, value))
    torch.ops.sola.gated_sum_(residual, receptance, value, out)
    if not (torch.compiler.is_compiling() or out.is_inference()):
        torch.autograd.graph.increment_version(out)  # so that a backward that saved it raises an error
    return out


def squared_relu(x: Tensor) -> Tensor:
    """Return max(x, 0)^2."""
    check_kind("squared_relu", x=x)
    return _squared_relu(x) if _use_plain_form(x) else torch.ops.sola.squared_relu(x)


def quad_shift(x: Tensor) -> Tensor:
    """Shift each quarter of the channels by one pixel, from the left, right, upper and lower neighbour; zero outside
    the image.

    x [B, H, W, C] -> [B, H, W, C]. The channels after the first 4 (C // 4) are not shifted.
    """
    # not in the paper: Vision-RWKV's mixes start with this shift (Q-Shift, worth 3.6 points there). SoLA-Vision adopts
    # Vision-RWKV's linear layer, but its text never mentions the shift. An argument of the network disables it.
    quarter = x.shape[-1] // 4
    left, right, above, below, rest = x.split([quarter] * 4 + [x.shape[-1] - 4 * quarter], dim=-1)
    pad = torch.nn.functional.pad
    return torch.cat(
        (
            # sliced after padding, so that an empty image keeps its shape
            pad(left, (0, 0, 1, 0))[:, :, :-1],
            pad(right, (0, 0, 0, 1))[:, :, 1:],
            pad(above, (0, 0, 0, 0, 1, 0))[:, :-1],
            pad(below, (0, 0, 0, 0, 0, 1))[:, 1:],
            rest,
        ),
        dim=-1,
    )


def interpolated(n: Tensor, mixes: Tensor, top: int, bottom: int) -> Tensor:
    """Return mix * n + (1 - mix) * quad_shift(n) for each row of mixes [M, C], in plain torch: n [B, H, W, C] ->
    [M, B, H - top - bottom, W, C].
    """
    shifted, height = quad_shift(n), n.shape[1]
    n, shifted = n[:, top : height - bottom], shifted[:, top : height - bottom]
    return torch.lerp(shifted, n, mixes.to(n.dtype)[:, None, None, None])


def _use_plain_form(*tensors: Tensor) -> bool:
    """True if the plain form is pinned, required by a tracer or transform, or fused by a compiler on a GPU, which is
    faster there than calling a kernel.
    """
    compiled = torch.compiler.is_compiling() and tensors[0].device.type != "cpu"
    return pinned() in ("reference", "portable") or compiled or seen_through(*tensors)


def _mixed_dtypes(*tensors: Tensor) -> bool:
    """True if dtypes differ, as under autocast, where residuals stay float32, on a device whose kernel does not support
    that. Only CUDA's does.
    """
    return tensors[0].device.type != "cuda" and any(x.dtype != tensors[0].dtype for x in tensors)


def _check_shift(x: Tensor, weight: Tensor, bias: Tensor, mixes: Tensor, top: int, bottom: int) -> None:
    check_kind("norm_shift", x=x, weight=weight, bias=bias, mixes=mixes)
    if x.ndim != 4:
        raise ValueError(f"norm_shift: x {size(x)} must be [B, H, W, C]")
    height, channels = x.shape[1], x.shape[3]
    parameters = (weight, bias, mixes)
    if [p.ndim for p in parameters] != [1, 1, 2] or any(p.shape[-1] != channels for p in parameters):
        raise ValueError(
            f"norm_shift: weight {size(weight)} and bias {size(bias)} must be [C] = [{channels}] "
            f"and mixes {size(mixes)} [M, C], the channels of x {size(x)}"
        )
    if top < 0 or bottom < 0 or top + bottom > height:
        raise ValueError(
            f"norm_shift: top {top} and bottom {bottom} must be >= 0 and sum to at most the height {height} of x"
        )


def _check_out(out: Tensor, *operands: Tensor) -> None:
    dtype = _promoted(*operands)
    if out.dtype != dtype or not out.is_contiguous():
        raise ValueError(f"gated_sum: out must be contiguous and {dtype}, got {out.dtype} with strides {out.stride()}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (out, *operands)):
        raise RuntimeError("gated_sum: a result written to out has no gradient; omit out, or use torch.no_grad()")


def _promoted(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors))


# ---- the definitions


def _norm_shift(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mixes: Tensor,
    top: int,
    bottom: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    dtype = dtype or x.dtype
    if not x.dtype == weight.dtype == bias.dtype:  # CUDA's layer norm takes one dtype
        wide = _promoted(x, weight, bias)
        x, weight, bias = x.to(wide), weight.to(wide), bias.to(wide)
    # int: during TorchScript tracing sizes are tensors
    n = torch.nn.functional.layer_norm(x, (int(x.shape[-1]),), weight, bias, eps)
    out = interpolated(n, mixes, top, bottom)
    return out if out.dtype == dtype else out.to(dtype)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    wide = _promoted(x, weight, bias)
    normed = torch.nn.functional.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return normed.to(dtype or x.dtype)


def _gate(receptance: Tensor, value: Tensor) -> Tensor:
    return torch.sigmoid(receptance) * value


def _gated_sum(residual: Tensor, receptance: Tensor, value: Tensor) -> Tensor:
    return residual + torch.sigmoid(receptance) * value


def _residual_sum(residual: Tensor, receptance: Tensor | None, value: Tensor, factors: Tensor | None) -> Tensor:
    """residual + factor * value, or with a receptance factor * gate; factors [B], one for each of the images that the
    others consist of, by default 1.
    """
    dtype = _promoted(residual, value) if receptance is None else _promoted(residual, receptance, value)
    branch = value if receptance is None else _gate(receptance, value)
    return (residual + (branch if factors is None else _of_images(branch, factors))).to(dtype)


def _scaled(x: Tensor, factors: Tensor, dtype: torch.dtype) -> Tensor:
    """Each of the images that x consists of times its factor, in another dtype."""
    return _of_images(x, factors).to(dtype)


def _of_images(x: Tensor, factors: Tensor) -> Tensor:
    # an empty tensor has no shape that -1 could complete
    return (x.reshape(len(factors), -1) * factors[:, None]).view(x.shape) if x.numel() else x.clone()


def _squared_relu(x: Tensor) -> Tensor:
    return torch.relu(x).square()


# ---- the backwards


def _norm_shift_backward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mixes: Tensor, grad: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # written out, since autograd does not record below its own dispatch keys, where the kernels fall back to this
    inputs = (x, weight, bias, mixes)
    wide = torch.promote_types(_promoted(*inputs), torch.float32)
    value, scale, shift, mix, grad = (tensor.to(wide) for tensor in (*inputs, grad))
    centred = value - value.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normal = centred * rstd
    n = normal * scale + shift
    gm = (grad * (n - quad_shift(n))).sum((1, 2, 3))
    own = (mix[:, None, None, None] * grad).sum(0)
    # of a shift: each token's gradient comes from the token whose neighbour it is, which is the opposite shift
    gn = own + quad_shift((grad.sum(0) - own).flip(1, 2)).flip(1, 2)
    gw, gb = (gn * normal).sum((0, 1, 2)), gn.sum((0, 1, 2))
    gn = gn * scale
    gx = rstd * (gn - gn.mean(-1, keepdim=True) - normal * (gn * normal).mean(-1, keepdim=True))
    if residual is not None:
        gx = gx + residual
    gradients = (gx.contiguous(), gw, gb, gm)
    gx, gw, gb, gm = (gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, inputs, strict=True))
    return gx, gw, gb, gm


def _layer_norm_backward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide, shape, inputs = _promoted(x, weight, bias), x.shape[-1:], (x, weight, bias)
    x, weight, bias = (tensor.to(wide) for tensor in inputs)
    _, *statistics = torch.native_layer_norm(x, shape, weight, bias, eps)
    gradients = torch.ops.aten.native_layer_norm_backward(
        grad.to(wide), x, shape, *statistics, weight, bias, [True, True, True]
    )
    gx, gw, gb = (gradient.to(tensor.dtype) for gradient, tensor in zip(gradients, inputs, strict=True))
    return gx.contiguous(), gw, gb


def _gate_backward(
    receptance: Tensor, value: Tensor, grad: Tensor, factors: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    sigmoid = torch.sigmoid(receptance)
    if factors is not None:
        grad = _of_images(grad, factors)
    grad_value = grad * sigmoid
    return (grad_value * (1 - sigmoid) * value).to(receptance.dtype), grad_value.to(value.dtype)


def _squared_relu_backward(x: Tensor, grad: Tensor) -> Tensor:
    return (2 * torch.relu(x) * grad).to(x.dtype)


# by the names of the kernels, with their arguments (`gpu_passes.py`)
PLAIN = SimpleNamespace(
    layer_norm=_layer_norm,
    layer_norm_backward=_layer_norm_backward,
    norm_shift=_norm_shift,
    norm_shift_backward=_norm_shift_backward,
    gate=_gate,
    gate_backward=_gate_backward,
    gated_sum=_gated_sum,
    residual_sum=_residual_sum,
    scaled=_scaled,
    squared_relu=_squared_relu,
    squared_relu_backward=_squared_relu_backward,
)

# ---- registration


def _like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _promoted_like(x: Tensor, *others: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=_promoted(x, *others), memory_format=torch.contiguous_format)


def _norm_shift_in(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mixes: Tensor, top: int, bottom: int, dtype: torch.dtype
) -> Tensor:
    return torch.ops.sola.norm_shift.default(x, weight, bias, eps, mixes, top, bottom).to(dtype)


def _fake_norm_shift(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    mixes: Tensor,
    top: int,
    bottom: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    batch, height, width, channels = x.shape
    return x.new_empty((mixes.shape[0], batch, height - top - bottom, width, channels), dtype=dtype)


def _fake_norm_shift_backward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mixes: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _like(x), _like(weight), _like(bias), _like(mixes)


def _save_tensors(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.numbers = [value for value in inputs if not isinstance(value, Tensor)]


def _backward(name: str) -> Any:
    """Return an operator's backward; its plain form, which is differentiable, in double backward."""
    return getattr(PLAIN if torch.is_grad_enabled() else torch.ops.sola, f"{name}_backward")


def _differentiate_norm_shift(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, mixes = ctx.saved_tensors
    eps, top, bottom, *dtype = ctx.numbers
    gx, gw, gb, gm = norm_shift_backward(x, weight, bias, eps, mixes, grad, top, bottom)
    return gx, gw, gb, None, gm, None, None, *(None for _ in dtype)


def _differentiate_gate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return _backward("gate")(*ctx.saved_tensors, grad)


def _differentiate_gated_sum(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    _, receptance, value = ctx.saved_tensors
    return grad, *_backward("gate")(receptance, value, grad)


def _differentiate_squared_relu(ctx: Any, grad: Tensor) -> Tensor:
    return _backward("squared_relu")(*ctx.saved_tensors, grad)


def _gated_sum_out(residual: Tensor, receptance: Tensor, value: Tensor, out: Tensor) -> None:
    out.copy_(_gated_sum(residual, receptance, value))


def register(library: torch.library.Library) -> None:
    """Define the passes, with their plain forms as default kernels."""

    def define(schema: str, kernel: Any, fake: Any, differentiate: Any = None) -> None:
        name = schema.partition("(")[0]
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, kernel, "CompositeExplicitAutograd")
        register_fake(library, name, fake)
        if differentiate is not None:
            torch.library.register_autograd(f"sola::{name}", differentiate, setup_context=_save_tensors, lib=library)

    shift = "(Tensor x, Tensor weight, Tensor bias, float eps, Tensor mixes, "
    define(f"norm_shift{shift}int top, int bottom) -> Tensor", _norm_shift, _fake_norm_shift, _differentiate_norm_shift)
    define(
        f"norm_shift.dtype{shift}int top, int bottom, ScalarType dtype) -> Tensor",
        _norm_shift_in,
        _fake_norm_shift,
        _differentiate_norm_shift,
    )
    define(
        f"norm_shift_backward{shift}Tensor grad) -> (Tensor, Tensor, Tensor, Tensor)",
        _norm_shift_backward,
        _fake_norm_shift_backward,
    )
    # inference only, and therefore without a gradient (`layers/norm.py`)
    define("layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor", _layer_norm, _like)
    define("gate(Tensor receptance, Tensor value) -> Tensor", _gate, _promoted_like, _differentiate_gate)
    define(
        "gate_backward(Tensor receptance, Tensor value, Tensor grad) -> (Tensor, Tensor)",
        _gate_backward,
        lambda receptance, value, grad: (_like(receptance), _like(value)),
    )
    define(
        "gated_sum(Tensor residual, Tensor receptance, Tensor value) -> Tensor",
        _gated_sum,
        _promoted_like,
        _differentiate_gated_sum,
    )
    define(
        "gated_sum_(Tensor residual, Tensor receptance, Tensor value, Tensor(a!) out) -> ()",
        _gated_sum_out,
        lambda *_: None,
    )
    autocast.register_plain(library, "gate", torch.ops.sola.gate, _gate)
    autocast.register_plain(library, "gated_sum", torch.ops.sola.gated_sum, _gated_sum)
    define("squared_relu(Tensor x) -> Tensor", _squared_relu, _like, _differentiate_squared_relu)
    define("squared_relu_backward(Tensor x, Tensor grad) -> Tensor", _squared_relu_backward, _like)
