# SPDX-License-Identifier: Apache-2.0
"""Whether a module is its parameters and nothing else. Kernels are given these instead of calling it; what
is replaced, wrapped, adapted or hooked has to be called.
"""

import torch
from torch import Tensor, nn

_TENSORS = (nn.Parameter, Tensor)


def is_plain(*modules: nn.Module) -> bool:
    """Whether kernels may be given the parameters of each: a projection without a bias, a layer norm that has one."""
    for module in modules:  # a plain loop: every layer asks in every forward
        if not is_untouched(module):
            return False
        bias = _parameter(module, "bias")
        if (type(bias) not in _TENSORS) if type(module) is nn.LayerNorm else bias is not None:
            return False
    return True


def is_untouched(module: nn.Module) -> bool:
    """Whether it is a linear layer or a layer norm that does what its parameters say. A low-rank adapter, a quantised
    module or weight, and one that is hooked or whose forward was replaced does more.
    """
    kind = nn.LayerNorm if type(module) is nn.LayerNorm else nn.Linear
    return _is_itself(module, kind) and type(_parameter(module, "weight")) in _TENSORS


def _parameter(module: nn.Module, name: str) -> object:
    """The attribute, without nn.Module's search where it is a parameter."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def is_affine(norm: nn.Module) -> bool:
    """Whether a norm is a layer norm with weight and bias and nothing else, so that these and its eps say it all. What
    kind of tensors they are is open: exporters have their own.
    """
    watched = not torch.is_grad_enabled() and hooked_everywhere()
    return _is_itself(norm, nn.LayerNorm) and norm.weight is not None and norm.bias is not None and not watched


def is_exactly(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module does what its class says, and nobody watches all calls."""
    return _is_itself(module, kind) and not hooked_everywhere()


def hooked_everywhere() -> bool:
    """Whether a global hook wants to see every module. In training it sees norms and projections of linear layers only
    where they are called anyway: such hooks count (torch's FlopCounterMode), and would change the memory in question.
    """
    return not torch.compiler.is_compiling() and torch.nn.modules.module._has_any_global_hook()


def _is_itself(module: nn.Module, kind: type[nn.Module]) -> bool:
    """No subclass, no wrapper, no hook of its own, no other forward."""
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in vars(module)
    )
