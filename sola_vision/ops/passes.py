# SPDX-License-Identifier: Apache-2.0
"""The element-wise passes around the operator: each is one operator in which a value crosses memory once.

What a pass computes is its plain form here, the underscored function of the same name: it is the default kernel of
`sola::NAME`, what `ops.use("portable")` runs and what `torch.compile` fuses on a GPU. On a CPU the C++ kernel takes
over (`csrc/passes.cpp`), on CUDA the Triton kernel (`gpu_passes.py`). The backwards read the inputs again; nothing else
is kept.
"""

import functools
from typing import Any

import torch
from torch import Tensor

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
    """mix * n + (1 - mix) * quad_shift(n) with n the layer norm of x, for each row of mixes.

    x [B, H, W, C], weight and bias [C], mixes [M, C] -> [M, B, H - top - bottom, W, C]: the outermost rows of a part of
    an image only lend their tokens to their neighbours. `dtype` is the result's, else it is that of x.
    """
    _check_shift(x, weight, bias, mixes, top, bottom)
    if _plain(x, weight, bias, mixes):
        made = _norm_shift(x, weight, bias, eps, mixes, top, bottom)
        return made if dtype is None else made.to(dtype)
    operator = torch.ops.sola.norm_shift
    if dtype in (None, x.dtype):
        return operator.default(x, weight, bias, eps, mixes, top, bottom)
    return operator.dtype(x, weight, bias, eps, mixes, top, bottom, dtype)


def norm_shift_backward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mixes: Tensor, grad: Tensor, top: int, bottom: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `norm_shift` for x, weight, bias and mixes, each in its input's dtype, from that of its result
    [M, B, H - top - bottom, W, C] in any.
    """
    if top or bottom:  # padding by nothing is a copy
        grad = torch.nn.functional.pad(grad, (0, 0, 0, 0, top, bottom))
    return _backward("norm_shift")(x, weight, bias, eps, mixes, grad)


def gate(receptance: Tensor, value: Tensor) -> Tensor:
    """sigmoid(receptance) * value, of one shape."""
    check_same_shape("gate", receptance=receptance, value=value)
    if _plain(receptance, value) or _mixed(receptance, value):
        return _gate(receptance, value)
    return torch.ops.sola.gate(receptance, value)


def gate_backward(receptance: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `gate` for its arguments, in steps that autograd does not see."""
    if _mixed(receptance, value, grad):
        return _gate_backward(receptance, value, grad)
    found: tuple[Tensor, Tensor] = torch.ops.sola.gate_backward(receptance, value, grad)
    return found


def gated_sum(residual: Tensor, receptance: Tensor, value: Tensor, out: Tensor | None = None) -> Tensor:
    """residual + sigmoid(receptance) * value, of one shape; written to `out` if there is one, contiguous and of the
    dtype that theirs promote to. That has no gradients: RuntimeError where one is wanted.
    """
    operands = {"residual": residual, "receptance": receptance, "value": value}
    check_same_shape("gated_sum", **operands, **({} if out is None else {"out": out}))
    plain = _plain(*operands.values()) or _mixed(*operands.values())
    if out is None:
        return (_gated_sum if plain else torch.ops.sola.gated_sum)(residual, receptance, value)
    _check_out(out, *operands.values())
    if plain:
        return out.copy_(_gated_sum(residual, receptance, value))
    torch.ops.sola.gated_sum_(residual, receptance, value, out)
    if not (torch.compiler.is_compiling() or out.is_inference()):
        torch.autograd.graph.increment_version(out)  # for a backward that has kept it
    return out


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2."""
    check_kind("squared_relu", x=x)
    return _squared_relu(x) if _plain(x) else torch.ops.sola.squared_relu(x)


def quad_shift(x: Tensor) -> Tensor:
    """Each quarter of the channels comes from another neighbour: left, right, above, below; zero outside the image.

    x [B, H, W, C] -> [B, H, W, C]. Channels beyond four times C // 4 stay where they are.
    """
    # not in the paper: Vision-RWKV's mixes begin with it (Q-Shift, worth 3.6 points there) and SoLA-Vision takes its
    # linear layer from Vision-RWKV, while its own text never names the shift. One argument of the network turns it off.
    quarter = x.shape[-1] // 4
    left, right, above, below, rest = x.split([quarter] * 4 + [x.shape[-1] - 4 * quarter], dim=-1)
    pad = torch.nn.functional.pad
    return torch.cat(
        (
            # cut after padding: an image without pixels keeps its size
            pad(left, (0, 0, 1, 0))[:, :, :-1],
            pad(right, (0, 0, 0, 1))[:, :, 1:],
            pad(above, (0, 0, 0, 0, 1, 0))[:, :-1],
            pad(below, (0, 0, 0, 0, 0, 1))[:, 1:],
            rest,
        ),
        dim=-1,
    )


def interpolated(n: Tensor, mixes: Tensor, top: int, bottom: int) -> Tensor:
    """mix * n + (1 - mix) * quad_shift(n) for each row of mixes [M, C], in plain torch: n [B, H, W, C] ->
    [M, B, H - top - bottom, W, C].
    """
    shifted, height = quad_shift(n), n.shape[1]
    n, shifted = n[:, top : height - bottom], shifted[:, top : height - bottom]
    return torch.lerp(shifted, n, mixes.to(n.dtype)[:, None, None, None])


def _plain(*tensors: Tensor) -> bool:
    """Whether plain torch is to be seen: pinned, by transforms that know nothing else, or by a compiler that fuses it
    better than it calls a kernel.
    """
    compiled = torch.compiler.is_compiling() and tensors[0].device.type != "cpu"
    return pinned() in ("reference", "portable") or compiled or seen_through(*tensors)


def _mixed(*tensors: Tensor) -> bool:
    """Whether dtypes differ where only one kernel, CUDA's, takes them as they are: with autocast residuals are wide."""
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
        raise ValueError(f"norm_shift: top {top} and bottom {bottom} must be rows of x's height of {height}")


def _check_out(out: Tensor, *operands: Tensor) -> None:
    dtype = _promoted(*operands)
    if out.dtype != dtype or not out.is_contiguous():
        raise ValueError(f"gated_sum: out must be contiguous and {dtype}, got {out.dtype} with strides {out.stride()}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (out, *operands)):
        raise RuntimeError("gated_sum: what is written to out has no gradient; leave out away, or use torch.no_grad()")


def _promoted(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (x.dtype for x in tensors))


# ---- the definitions


def _norm_shift(x: Tensor, weight: Tensor, bias: Tensor, eps: float, mixes: Tensor, top: int, bottom: int) -> Tensor:
    # int: where TorchScript traces, sizes are tensors
    n = torch.nn.functional.layer_norm(x, (int(x.shape[-1]),), weight, bias, eps)
    return interpolated(n, mixes, top, bottom)


def _gate(receptance: Tensor, value: Tensor) -> Tensor:
    return torch.sigmoid(receptance) * value


def _gated_sum(residual: Tensor, receptance: Tensor, value: Tensor) -> Tensor:
    return residual + torch.sigmoid(receptance) * value


def _squared_relu(x: Tensor) -> Tensor:
    return torch.relu(x).square()


# ---- their backwards


def _norm_shift_backward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, mixes: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    again = torch.is_grad_enabled()  # then the result is to be differentiated, and the inputs are part of a graph
    with torch.enable_grad():
        inputs = [tensor.view_as(tensor) if again else tensor.detach() for tensor in (x, weight, bias, mixes)]
        for tensor in inputs:
            if not tensor.requires_grad:
                tensor.requires_grad_()
        out = _norm_shift(inputs[0], inputs[1], inputs[2], eps, inputs[3], 0, 0)
        gx, gw, gb, gm = torch.autograd.grad(out, inputs, grad.to(out.dtype), create_graph=again)
    return gx.contiguous(), gw, gb, gm


def _gate_backward(receptance: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    opened = torch.sigmoid(receptance)
    through = grad * opened
    return (through * (1 - opened) * value).to(receptance.dtype), through.to(value.dtype)


def _squared_relu_backward(x: Tensor, grad: Tensor) -> Tensor:
    return (2 * torch.relu(x) * grad).to(x.dtype)


_BACKWARDS = {"norm_shift": _norm_shift_backward, "gate": _gate_backward, "squared_relu": _squared_relu_backward}

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
    """An operator's backward; its plain form where the result is to be differentiated again."""
    return _BACKWARDS[name] if torch.is_grad_enabled() else getattr(torch.ops.sola, f"{name}_backward")


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
    """Defines the passes with their plain forms as default kernels."""

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
    define("squared_relu(Tensor x) -> Tensor", _squared_relu, _like, _differentiate_squared_relu)
    define("squared_relu_backward(Tensor x, Tensor grad) -> Tensor", _squared_relu_backward, _like)
