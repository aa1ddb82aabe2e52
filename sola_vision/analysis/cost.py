# SPDX-License-Identifier: Apache-2.0
"""The cost of a network: parameters, multiply-adds (MACs) and activation memory, counted on meta tensors.

Nothing is allocated or computed, so counting takes a fraction of a second at any image size. MACs are half of the count
of torch's `FlopCounterMode`: matrix products, convolutions, attention, and 29 N C for Bi-WKV (Vision-RWKV's
convention). Element-wise operations, norms, softmax and interpolation are not counted, as in published tables.
"""

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from sola_vision.backbone import SolaVision
from sola_vision.config import SolaConfig

_OPERATORS = {"mm": "linear", "addmm": "linear", "bmm": "matrix product", "baddbmm": "matrix product"}
_LOCK = threading.Lock()  # one count at a time: global module hooks change the memory that our layers use


@dataclass(frozen=True)
class Row:
    """The cost of one module, without its submodules."""

    module: str  # "stages.0.layers.1.mixer.key"; "" for operations of the network outside its submodules
    stage: str
    layer: str
    operator: str  # "linear", "convolution", "wkv", "attention", "matrix product", or "" if nothing is counted
    parameters: int
    macs: int
    saved_bytes: int  # activations saved for the backward pass


@dataclass(frozen=True)
class Group:
    """The sum of several rows."""

    name: str
    parameters: int
    macs: int
    saved_bytes: int


@dataclass(frozen=True)
class Cost:
    """The cost of one forward pass; activation memory is that of `batch` images.

    peak_bytes: the peak size of the activations in inference. saved_bytes: the activations that training saves for the
    backward pass. Neither includes weights, the image or workspace inside kernels.
    """

    model: str
    height: int
    width: int
    batch: int
    parameters: int
    macs: int
    peak_bytes: int
    saved_bytes: int
    rows: tuple[Row, ...]

    @property
    def gmacs(self) -> float:
        """MACs in units of 10^9."""
        return self.macs / 1e9

    @property
    def stages(self) -> list[Group]:
        """Cost by stage."""
        return self._grouped(lambda row: row.stage)

    @property
    def layers(self) -> list[Group]:
        """Cost by layer, including bridges and patch merging."""
        return self._grouped(lambda row: row.layer)

    @property
    def operators(self) -> list[Group]:
        """Cost by operator; "other" for modules without counted operations."""
        return self._grouped(lambda row: row.operator or "other")

    def _grouped(self, key: Callable[[Row], str]) -> list[Group]:
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(key(row), []).append(row)
        return [
            Group(name, sum(r.parameters for r in rs), sum(r.macs for r in rs), sum(r.saved_bytes for r in rs))
            for name, rs in groups.items()
        ]


def build(
    name: str, size: tuple[int, int], num_classes: int = 1000, *, device: str = "meta", **changes: Any
) -> nn.Module:
    """Create a network of timm's registry, in evaluation mode, for images of `size` (height, width).

    device: "meta" (default) allocates no weights. changes: fields of SolaConfig for sola_* names, otherwise arguments
    of the timm model. Raise ValueError for an unknown name.
    """
    if not timm.is_model(name):
        raise ValueError(f"model {name!r} is unknown: use sola_nano, sola_tiny, sola_small, sola_base or a timm name")
    changes["num_classes"] = num_classes
    with torch.device(device):
        if name.startswith("sola_"):
            return timm.create_model(name, **changes).eval()
        try:
            # transformers with windows or learned positions are built for one size
            return timm.create_model(name, img_size=size, **changes).eval()
        except TypeError:
            return timm.create_model(name, **changes).eval()


def count(model: nn.Module, size: tuple[int, int], batch: int = 1, *, name: str = "", in_chans: int = 3) -> Cost:
    """Return the cost of one forward pass for images of `size` (height, width).

    Raise ValueError if the model is not on the meta device (see `build`), or if it does not support the size.
    """
    height, width = size
    if min(height, width, batch) < 1:
        raise ValueError(f"size {height}x{width} and batch {batch} must be at least 1")
    if any(parameter.device.type != "meta" for parameter in model.parameters()):
        raise ValueError(
            "count needs a model on the meta device: build it under torch.device('meta'), or with cost.build"
        )
    image = torch.empty(batch, in_chans, height, width, device="meta")
    weights = frozenset(_storage(t) for t in (*model.parameters(), *model.buffers()))
    flops, peak = FlopCounterMode(display=False), _PeakMemory(weights | {_storage(image)})
    flops.mod_tracker = _Modules()
    try:
        with _LOCK:
            with torch.no_grad(), FusedAttention():
                with flops:
                    model(image)
                with peak:  # separately: with the counter's global hooks, our layers use more memory
                    model(image)
            saved = _saved_bytes(model, image, weights | {_storage(image)})
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name or type(model).__name__} does not take {height}x{width} images: {reason}") from None
    macs = _own_macs(flops.get_flop_counts(), type(model).__name__)
    rows = tuple(_rows(model, macs, saved))
    return Cost(
        model=name or type(model).__name__,
        height=height,
        width=width,
        batch=batch,
        parameters=sum(row.parameters for row in rows),
        macs=sum(row.macs for row in rows),
        peak_bytes=peak.most,
        saved_bytes=sum(row.saved_bytes for row in rows),
        rows=rows,
    )


def full_softmax(config: SolaConfig) -> SolaConfig:
    """Return the configuration with every layer softmax: the "SoLA-FullSoftmax" of Figure 1(b)."""
    return config.with_changes(schedule=config.schedule.replace("L", "S"), bridges="")


class FusedAttention(TorchFunctionMode):
    """Count attention without a mask as fused kernels compute it: the same MACs, no N x N matrix in memory.

    On meta tensors torch decomposes attention into its unfused form, whose N x N matrix no device materialises.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (
            func is not nn.functional.scaled_dot_product_attention
            or len(args) > 3
            or kwargs.get("attn_mask") is not None
        ):
            return func(*args, **kwargs)
        query, key, value = (args + tuple(kwargs[n] for n in ("query", "key", "value")[len(args) :]))[:3]
        if query.ndim != 4:
            return func(*args, **kwargs)
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


class _Modules(ModuleTracker):
    """Track the modules whose forward is running in this thread.

    torch's own tracker includes modules of other threads, and hooks the gradients of module inputs, which fails for
    views of parameters when no gradient is recorded.
    """

    def __enter__(self) -> "_Modules":
        thread = threading.get_ident()

        def enter(module: nn.Module, args: Any) -> None:
            if threading.get_ident() == thread:
                self.parents.add(self._get_mod_name(module))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                self.parents.discard(self._get_mod_name(module))

        self._fw_pre_handle = register_module_forward_pre_hook(enter)
        self._fw_post_handle = register_module_forward_hook(leave)
        return self


class _PeakMemory(TorchDispatchMode):
    """Track the peak number of bytes in live tensors, except those with storages in `known`."""

    def __init__(self, known: frozenset[int]) -> None:
        super().__init__()
        self.known = known
        self.live: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known or key in self.live:
            return
        self.live.add(key)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self.live.discard(key)
        self.now -= size


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _saved_bytes(model: nn.Module, image: Tensor, known: Iterable[int]) -> dict[str, int]:
    """Return the bytes saved for the backward pass, by the module that saved them first."""
    tracker = _Modules()
    seen = set(known)
    saved: dict[str, int] = {}
    root = type(model).__name__

    def pack(tensor: Tensor) -> Tensor:
        key = _storage(tensor)
        if key not in seen:
            seen.add(key)
            inside = max((p for p in tracker.parents if p != "Global"), key=len, default=root)
            module = inside.removeprefix(root).removeprefix(".")
            saved[module] = saved.get(module, 0) + tensor.untyped_storage().nbytes()
        return tensor

    with torch.enable_grad(), FusedAttention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), tracker:
        kept = model(image)  # keeps the graph and its storages alive until all are recorded
    del kept
    return saved


def _own_macs(counts: dict[str, dict[Any, int]], root: str) -> dict[str, dict[str, int]]:
    """Convert FlopCounterMode's inclusive counts to {module: {operator: MACs without submodules}}."""
    own: dict[str, dict[str, int]] = {}
    totals = {"": counts["Global"]} | {
        n.removeprefix(root + "."): c for n, c in counts.items() if n not in ("Global", root)
    }
    for name, flops in totals.items():
        for operator, number in flops.items():
            label = str(operator).split(".", 1)[1]
            label = "attention" if "attention" in label else _OPERATORS.get(label, label)
            own.setdefault(name, {})[label] = own.get(name, {}).get(label, 0) + number // 2
    inclusive = {name: dict(by_operator) for name, by_operator in own.items()}
    for name, by_operator in inclusive.items():
        if name:
            outer = name.rpartition(".")[0]
            while outer and outer not in inclusive:
                outer = outer.rpartition(".")[0]
            for label, number in by_operator.items():
                own[outer][label] -= number
    return own


def _rows(model: nn.Module, macs: dict[str, dict[str, int]], saved: dict[str, int]) -> Iterable[Row]:
    counted: set[int] = set()  # a shared parameter counts once
    for name, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in counted]
        counted.update(map(id, own))
        parameters = sum(p.numel() for p in own)
        operators = {label: number for label, number in macs.get(name, {}).items() if number} or {"": 0}
        kept = saved.get(name, 0)
        if not (parameters or kept or any(operators.values())):
            continue
        stage, layer = _place(model, name)
        for operator, number in operators.items():
            yield Row(name, stage, layer, operator, parameters, number, kept)
            parameters = kept = 0  # count them once per module, not once per operator


def _place(model: nn.Module, module: str) -> tuple[str, str]:
    """Return the names of the stage and the layer that a module belongs to."""
    parts = module.split(".")
    if isinstance(model, SolaVision):
        if parts[0] != "stages":
            return parts[0] or "network", parts[0] or "network"
        stage = int(parts[1])
        name = f"stage {stage + 1}"
        if len(parts) > 3 and parts[2] == "layers":
            number = int(parts[3])
            return name, f"{stage + 1}.{number + 1} {model.config.parsed_schedule.stages[stage][number]}"
        if len(parts) > 3 and parts[2] == "bridges":
            stage_module: Any = model.stages[stage]
            return name, f"bridge {stage_module.bridge_ends[int(parts[3])]}"
        return name, f"merge {stage}>{stage + 1}"
    info = getattr(model, "feature_info", None) or []
    for entry in info if isinstance(info, list) else list(info):
        stage_name = entry["module"]
        if module == stage_name or module.startswith(stage_name + "."):
            numbers = [i for i, part in enumerate(parts) if part.isdigit()]
            return stage_name, ".".join(parts[: numbers[-1] + 1]) if numbers else stage_name
    return parts[0] or "network", parts[0] or "network"
