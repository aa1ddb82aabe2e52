# SPDX-License-Identifier: Apache-2.0
"""The private names of torch and timm that this package uses, each with its reason: what to look at first when a new
version of them breaks something. A name that is used without being listed fails, and so does one that no longer exists.
"""

import argparse
import ast
from pathlib import Path

import pytest
import timm.models
import torch
import torch.fx.experimental._config
from torch.utils.module_tracker import ModuleTracker

PACKAGE = Path(__file__).parent.parent / "sola_vision"

MODULE, LOADER = torch.nn.Linear(1, 1), torch.utils.data.DataLoader([0])
PROGRAM = torch.export.export(MODULE, (torch.zeros(2, 1),))

# name -> (an object that has it, why there is no public name)
NAMES = {
    # dispatch: torch has no public guards for operators written in Python
    "_C": (torch, "holds the guards and questions below"),
    "_AutoDispatchBelowAutograd": (torch._C, "an operator calls its kernel below autograd"),
    "_ExcludeDispatchKeyGuard": (torch._C, "an operator calls itself below autocast"),
    "_len_torch_dispatch_stack": (torch._C, "dispatch modes do not see kernels that are launched without an operator"),
    "_functorch": (torch._C, "holds the next"),
    "is_legacy_batchedtensor": (torch._C._functorch, "a backward with batched gradients"),
    "_are_functorch_transforms_active": (torch._C, "torch.func differentiates ATen operators only"),
    "_current_level": (torch.autograd.forward_ad, "forward-mode differentiation does, too"),
    "_unsafe_view": (torch.ops.aten, "a result that autograd must not take for a view"),
    # modules: kernels read their parameters instead of calling them, unless somebody observes the calls
    "_parameters": (MODULE, "a parameter without nn.Module's slow lookup"),
    "_forward_hooks": (MODULE, "is a call observed?"),
    "_forward_pre_hooks": (MODULE, "is a call observed?"),
    "_backward_hooks": (MODULE, "is a call observed?"),
    "_backward_pre_hooks": (MODULE, "is a call observed?"),
    "_has_any_global_hook": (torch.nn.modules.module, "is a call observed?"),
    # speed
    "_foreach_copy_": (torch, "many tensors in one kernel"),
    "_foreach_lerp_": (torch, "many tensors in one kernel"),
    "_is_mkldnn_bf16_supported": (
        torch.ops.mkldnn,
        "a note where bfloat16 is emulated; decides whether the next two are used",
    ),
    "_linear_pointwise": (torch.ops.mkldnn, "a product with its bias; used only where it exists"),
    "_convolution_pointwise": (torch.ops.mkldnn, "a convolution with its GELU; used only where it exists"),
    # data loading: workers live as long as their iterator
    "_iterator": (LOADER, "of persistent workers"),
    "_shutdown_workers": (torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "ends workers at once"),
    # costs: counted by modes, which have no public base
    "_python_dispatch": (torch.utils, "TorchDispatchMode"),
    "_pytree": (torch.utils, "the tensors in a result"),
    "_cdata": (torch.zeros(1).untyped_storage(), "the identity of a storage"),
    "_get_mod_name": (ModuleTracker, "a tracker for one thread"),
    "_scaled_dot_product_flash_attention": (torch.ops.aten, "attention on meta tensors without an N x N matrix"),
    # export
    "_config": (torch.fx.experimental, "sizes of 1 are not special"),
    "_sympy": (torch.utils, "ranges of sizes"),
    "_guards_code": (PROGRAM, "conditions that only come from the example"),
    "_range_constraints": (PROGRAM, "conditions that only come from the example"),
    "_inductor": (torch, "AOTInductor, which is documented under this name"),
    # others
    "_features": (timm.models, "feature_take_indices, which timm's networks use"),
    "_option_string_actions": (argparse.ArgumentParser(), "the options of a parser"),
}


def names(tree):
    """Private names in a file: used as an attribute, imported from elsewhere, and defined by the file."""
    used, imported, defined = set(), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            (defined if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self" else used).add(node.attr)
        elif isinstance(node, ast.ImportFrom) and not node.level and not (node.module or "").startswith("sola_vision"):
            imported |= {*node.module.split("."), *(name.name for name in node.names)}
        elif isinstance(node, ast.Import):
            imported |= {part for name in node.names for part in name.name.split(".")}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
    return [{name for name in some if name[0] == "_" and name[:2] != "__"} for some in (used, imported, defined)]


def test_every_private_name_of_another_package_is_listed():
    files = [names(ast.parse(path.read_text())) for path in PACKAGE.rglob("*.py")]
    used, imported, defined = (set().union(*some) for some in zip(*files, strict=True))
    assert (used - defined) | imported == {name for name in NAMES if name[0] == "_"}


@pytest.mark.parametrize("name", NAMES)
def test_it_exists_in_this_version(name):
    assert hasattr(NAMES[name][0], name)
