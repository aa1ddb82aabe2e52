# SPDX-License-Identifier: Apache-2.0
"""The backbone of dense tasks: four normalised feature maps, at strides 4, 8, 16 and 32 of an image of any size.

It is timm's `features_only` network, sola_* or any other with four levels, and a LayerNorm on each map. Parameter
groups (layer-wise decay, no weight decay) are the backbone's, under a prefix.
"""

import re
from collections.abc import Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from timm.layers import LayerNorm2d, PatchEmbed
from torch import Tensor, nn

from sola_vision.engine import LoadReport
from sola_vision.layers import resize_position
from sola_vision.tasks.model import create_network, explain_mismatch, own_fields
from sola_vision.wording import amount

_LEVELS = 4


class Pyramid(nn.Module):
    """Feature maps of a backbone: image [B, 3, H, W] -> four maps [B, C_i, ceil(H / stride), ceil(W / stride)]."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.channels, self.strides = _levels(body)
        self.body = body
        self.channels_last = getattr(body, "output_fmt", "NCHW") == "NHWC"  # for Swin and MambaOut
        # not in the paper: the output of a residual stage is not normalised, so every map gets a LayerNorm, as in
        # Swin's dense models
        self.norms = nn.ModuleList(LayerNorm2d(count) for count in self.channels)

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = self.body(image)[-_LEVELS:]
        if self.channels_last:
            maps = [x.movedim(-1, 1) for x in maps]
        return [norm(x) for norm, x in zip(self.norms, maps, strict=True)]

    @property
    def network(self) -> nn.Module:
        """timm's network inside, whose configuration is stored in a checkpoint."""
        inner = getattr(self.body, "model", self.body)
        assert isinstance(inner, nn.Module)
        return inner

    def start_from(self, stored: Mapping[str, Tensor], path: Path, drop_bridges: bool = False) -> str:
        """Load a classifier's weights except its head; return a one-line description.

        A position embedding of another size is interpolated. Raise ValueError if anything else does not fit, including
        bridges that this network lacks unless `drop_bridges` is set.
        """
        own = self.body.state_dict()
        # timm's wrappers replace the dots in module names by underscores
        names = {name.removeprefix("model.").replace(".", "_"): name for name in own}
        matched = {names[name.replace(".", "_")]: name for name in stored if name.replace(".", "_") in names}
        spare = [name for name in stored if name not in matched.values()]
        bridges = [name for name in spare if ".bridges." in name]
        # a classifier's final norm and head, after the last map, are not needed
        unexpected = [name for name in spare if name not in bridges and not name.startswith(("head", "norm.", "fc."))]
        weights, changed = {}, []
        for name, stored_name in matched.items():
            value = stored[stored_name]
            if name.endswith("position.weight") and value.shape != own[name].shape and value.ndim == 4:
                value = resize_position(value, own[name].shape[-2:])
                changed.append("position embedding interpolated")
            weights[name] = value
        report = LoadReport(
            missing=tuple(name for name in own if name not in weights),
            unexpected=tuple(unexpected if drop_bridges else [*bridges, *unexpected]),
            resized=tuple(name for name, value in weights.items() if value.shape != own[name].shape),
        )
        if report:
            if bridges and not drop_bridges:
                hint = "use drop_bridges to skip bridges"
            else:
                hint = explain_mismatch(path, self.network) or "use the same network"
            raise ValueError(f"{path} does not fit the backbone: {report}; {hint}")
        self.body.load_state_dict(weights)
        changed += [f"{amount(len(bridges), 'weight')} of bridges dropped"] if bridges else []
        return f"backbone from {path}" + (f" ({', '.join(changed)})" if changed else "")

    def freeze(self, stages: int) -> None:
        """Freeze the weights of the stem and the first `stages` stages."""
        network = self._network(f"frozen_stages={stages}")
        if not hasattr(network, "stem") or not hasattr(network, "stages"):
            raise ValueError(f"frozen_stages={stages}: {type(network).__name__} has no stem and stages; use 0")
        if not 0 <= stages <= len(network.stages):
            raise ValueError(f"frozen_stages={stages} must lie in 0..{len(network.stages)}")
        parts = [network.stem, getattr(network, "position", nn.Identity()), *list(network.stages)[:stages]]
        for part in parts if stages else []:
            part.requires_grad_(False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the backbone's activations in the backward pass instead of keeping them."""
        self._network("checkpointing").set_grad_checkpointing(enable)

    def group_matcher(self, prefix: str) -> dict[str, Any]:
        """Return timm's groups for layer-wise decay of a model that holds this module under `prefix`."""
        inner = self._network("layer_decay").group_matcher()
        return {name: below(f"{prefix}.body.model.", what) for name, what in inner.items()}

    def no_weight_decay(self, prefix: str) -> set[str]:
        """Return the names, under `prefix`, of the backbone's parameters without weight decay."""
        network: Any = self.network
        names = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
        inside = f"{prefix}.body" if network is self.body else f"{prefix}.body.model"
        return {f"{inside}.{name}" for name in names}

    def _network(self, option: str) -> Any:
        # timm's other wrappers take the network apart and drop its methods, such as group_matcher
        if not hasattr(self.body, "model"):
            raise ValueError(f"{option} is not supported for timm's {type(self.body).__name__}: leave it out")
        return self.body.model


def _levels(body: nn.Module) -> tuple[list[int], list[int]]:
    """Return the channels and strides of the last four maps."""
    info: Any = body.feature_info
    channels, strides = list(info.channels()), list(info.reduction())
    # networks of timm that start at stride 2 have a fifth map, which no head here uses
    last = strides[-_LEVELS:]
    if len(last) < _LEVELS or any(after != 2 * before for before, after in pairwise(last)):
        raise ValueError(
            f"its feature maps have strides {', '.join(map(str, strides))}: dense tasks need four, "
            "each twice the previous one; choose a hierarchical network such as sola_tiny"
        )
    return channels[-_LEVELS:], last


def create_body(name: str, changes: dict[str, Any], size: tuple[int, int]) -> nn.Module:
    """Create a network of timm's registry as its feature maps.

    Raise ValueError if it has none, or cannot process an image of `size` (H, W), a test for arbitrary sizes.
    """
    any_size = {"strict_img_size": False} if name.startswith("swin") else {}
    body = create_network(name, None, None, {**changes, **any_size, "features_only": True})
    if own_fields(name):
        return body
    _levels(body)
    if not hasattr(body, "model"):
        body.no_weight_decay = partial(set, _undecayed(body, name, {**changes, **any_size}))
    for part in body.modules():
        if isinstance(part, PatchEmbed):
            part.dynamic_img_pad = True  # Swin only takes whole patches and has no argument for this
    body.eval()  # keeps the statistics of batch normalisation unchanged
    try:
        with torch.no_grad():
            body(torch.zeros(1, 3, *size))
    # layers raise various errors for a size that they do not support
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"it does not take images of {size[0]}x{size[1]} pixels ({error}): choose a network for any image size, "
            "such as sola_tiny, convnext_tiny or swin_tiny_patch4_window7_224"
        ) from None
    return body.train()


def _undecayed(body: nn.Module, name: str, changes: dict[str, Any]) -> list[str]:
    """Return the parameters of `body` without weight decay. timm has taken the network apart, which loses its method
    and replaces dots in the names of its layers by underscores.
    """
    with torch.device("meta"):
        network = create_network(name, None, None, changes)
    names = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    flat = {each.replace(".", "_") for each in names}
    return [each for each, _ in body.named_parameters() if each.replace(".", "_") in flat]


def below(prefix: str, what: Any) -> Any:
    """Return a specification of timm's group matcher for names that start with `prefix`."""
    if isinstance(what, str):
        bare = re.sub(r"(?<!\[)\^", "", what)
        return f"^{re.escape(prefix)}(?:{bare})"
    if isinstance(what, list | tuple):
        return [(below(prefix, pattern), order) for pattern, order in what]
    return what
