# SPDX-License-Identifier: Apache-2.0
"""Tests whether a kernel may read a module's parameters instead of calling it: not if the module is a subclass or a
wrapper, has an adapter, a quantised weight or a hook, or if its forward was replaced.
"""

from typing import Any

import torch
from torch import Tensor, nn

_TENSORS = (nn.Parameter, Tensor)


def is_unmodified(*modules: nn.Module) -> bool:
    """True if kernels may read the parameters of all modules: nn.Linear without a bias, nn.LayerNorm with one."""
    for module in modules:  # a plain loop: every layer runs this in every forward
        if not is_stock(module):
            return False
        if not has_plain_parameters(module) if type(module) is nn.LayerNorm else parameter(module, "bias") is not None:
            return False
    return True


def has_plain_parameters(norm: nn.LayerNorm) -> bool:
    """True if a norm has both parameters, and they are plain tensors."""
    return type(parameter(norm, "weight")) in _TENSORS and type(parameter(norm, "bias")) in _TENSORS


def is_stock(module: nn.Module) -> bool:
    """True for an nn.Linear or nn.LayerNorm with a plain weight: no adapter, quantised weight, hook or own forward."""
    kind = nn.LayerNorm if type(module) is nn.LayerNorm else nn.Linear
    return is_unhooked(module, kind) and type(parameter(module, "weight")) in _TENSORS


def parameter(module: nn.Module, name: str) -> Any:
    """getattr without nn.Module's slow lookup where the attribute is a parameter, or None in its place."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def is_affine(norm: nn.Module) -> bool:
    """True if a norm is an nn.LayerNorm fully described by weight, bias and eps. Any tensor type is accepted, since
    exporters bring their own.
    """
    hooked = not torch.is_grad_enabled() and has_global_hook()
    return is_unhooked(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None and not hooked


def is_exactly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True if calling the module runs the class's own forward, and no hook observes the call."""
    return is_unhooked(module, kind) and not has_global_hook()


def has_global_hook() -> bool:
    """True if a global module hook is registered. In training norms and projections of linear layers are not called for
    it: such hooks count operations (torch's FlopCounterMode), and calling them would change the memory.
    """
    return not torch.compiler.is_compiling() and torch.nn.modules.module._has_any_global_hook()


def is_unhooked(module: nn.Module, kind: type[nn.Module]) -> bool:
    """True for exactly this class, with its own forward and without hooks of its own (global ones may exist)."""
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in vars(module)
    )
