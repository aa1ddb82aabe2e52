# SPDX-License-Identifier: Apache-2.0
"""The backbone as dense tasks see it: four normalised feature maps, at strides 4, 8, 16 and 32 of any image.

It is timm's `features_only` network, sola_* or any other with four levels, and a LayerNorm on each map. Parameter
groups (layer-wise decay, no weight decay) are the backbone's own, found below a prefix.
"""

import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from timm.layers import LayerNorm2d, PatchEmbed
from torch import Tensor, nn

from sola_vision.engine import LoadReport
from sola_vision.layers import resize_position
from sola_vision.tasks.model import create_network, own_fields

_LEVELS = 4


class Pyramid(nn.Module):
    """image [B, 3, H, W] -> list of four maps [B, C_i, ceil(H / stride), ceil(W / stride)]."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.channels, self.strides = _levels(body)
        self.body = body
        self.channels_last = getattr(body, "output_fmt", "NCHW") == "NHWC"  # Swin's and MambaOut's are
        # not in the paper: residual stages end unnormalised, so every map gets a LayerNorm, as Swin's dense models have
        self.norms = nn.ModuleList(LayerNorm2d(count) for count in self.channels)

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = self.body(image)[-_LEVELS:]
        if self.channels_last:
            maps = [x.movedim(-1, 1) for x in maps]
        return [norm(x) for norm, x in zip(self.norms, maps, strict=True)]

    @property
    def network(self) -> nn.Module:
        """timm's network inside, whose configuration a checkpoint carries."""
        inner = getattr(self.body, "model", self.body)
        assert isinstance(inner, nn.Module)
        return inner

    def start_from(self, stored: Mapping[str, Tensor], path: Path, drop_bridges: bool = False) -> str:
        """Take over a classifier's weights but for its head; returns what happened, in one line.

        Bridges that the checkpoint has and this network has not are an error unless `drop_bridges` asks to leave them
        out; anything else that does not fit is one as well. A position embedding of another size is interpolated.
        """
        own = self.body.state_dict()
        # timm's wrappers write a module's name with underscores; without dots both forms are one
        names = {name.removeprefix("model.").replace(".", "_"): name for name in own}
        found = {names[name.replace(".", "_")]: name for name in stored if name.replace(".", "_") in names}
        spare = [name for name in stored if name not in found.values()]
        bridges = [name for name in spare if ".bridges." in name]
        # what comes after the last map: a classifier's final norm and its head
        unexpected = [name for name in spare if name not in bridges and not name.startswith(("head", "norm.", "fc."))]
        weights, changed = {}, []
        for mine, theirs in found.items():
            value = stored[theirs]
            if mine.endswith("position.weight") and value.shape != own[mine].shape and value.ndim == 4:
                value = resize_position(value, own[mine].shape[-2:])
                changed.append("position embedding interpolated")
            weights[mine] = value
        report = LoadReport(
            missing=tuple(name for name in own if name not in weights),
            unexpected=tuple(unexpected if drop_bridges else [*bridges, *unexpected]),
            resized=tuple(name for name, value in weights.items() if value.shape != own[name].shape),
        )
        if report:
            hint = "drop_bridges leaves its bridges out" if bridges and not drop_bridges else "use the same network"
            raise ValueError(f"{path} does not fit the backbone: {report}; {hint}")
        self.body.load_state_dict(weights)
        changed += [f"{len(bridges)} weights of bridges dropped"] if bridges else []
        return f"backbone from {path}" + (f" ({', '.join(changed)})" if changed else "")

    def freeze(self, stages: int) -> None:
        """The stem and the first `stages` stages keep their weights."""
        network = self._network(f"frozen_stages={stages}")
        if not hasattr(network, "stem") or not hasattr(network, "stages"):
            raise ValueError(f"frozen_stages={stages}: {type(network).__name__} has no stem and stages; use 0")
        if not 0 <= stages <= len(network.stages):
            raise ValueError(f"frozen_stages={stages} must lie in 0..{len(network.stages)}")
        parts = [network.stem, getattr(network, "position", nn.Identity()), *list(network.stages)[:stages]]
        for part in parts if stages else []:
            part.requires_grad_(False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self._network("checkpointing").set_grad_checkpointing(enable)

    def group_matcher(self, prefix: str) -> dict[str, Any]:
        """timm's groups for layer-wise decay of a model that holds this module under `prefix`."""
        inner = self._network("layer_decay").group_matcher()
        return {name: below(f"{prefix}.body.model.", what) for name, what in inner.items()}

    def no_weight_decay(self, prefix: str) -> set[str]:
        network: Any = getattr(self.body, "model", None)
        names = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
        return {f"{prefix}.body.model.{name}" for name in names}

    def _network(self, option: str) -> Any:
        # timm's other wrappers take a network apart, and with it what it knows about itself
        if not hasattr(self.body, "model"):
            raise ValueError(f"{option} needs a backbone that stays whole, which {type(self.body).__name__} does not")
        return self.body.model


def _levels(body: nn.Module) -> tuple[list[int], list[int]]:
    """Channels and strides of the last four maps."""
    info: Any = body.feature_info
    channels, strides = list(info.channels()), list(info.reduction())
    # networks of timm that begin at stride 2 have a fifth map, which no head here asks for
    last = strides[-_LEVELS:]
    if len(last) < _LEVELS or any(after != 2 * before for before, after in pairwise(last)):
        raise ValueError(
            f"its feature maps have strides {', '.join(map(str, strides))}: dense tasks need four, "
            "each twice the one before; choose a hierarchical network such as sola_tiny"
        )
    return channels[-_LEVELS:], last


def create_body(name: str, changes: dict[str, Any], size: tuple[int, int]) -> nn.Module:
    """A network of timm's registry as its feature maps. ValueError if it has none, or not of images of `size` (H, W),
    which stands for all the sizes that it will see.
    """
    any_size = {"strict_img_size": False} if name.startswith("swin") else {}
    body: nn.Module = create_network(name, None, None, {**changes, **any_size, "features_only": True})
    if own_fields(name):
        return body
    _levels(body)
    for part in body.modules():
        if isinstance(part, PatchEmbed):
            part.dynamic_img_pad = True  # Swin's takes whole patches alone, and has no argument for this
    body.eval()  # the statistics of batch normalisation stay as they are
    try:
        with torch.no_grad():
            body(torch.zeros(1, 3, *size))
    # whatever a layer says that meets a size it was not made for
    except (AssertionError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"it takes no image of {size[0]}x{size[1]} pixels ({error}): choose a network for images of any size, "
            "such as sola_tiny, convnext_tiny or swin_tiny_patch4_window7_224"
        ) from None
    return body.train()


def below(prefix: str, what: Any) -> Any:
    """A specification of timm's group matcher for names that begin with `prefix`."""
    if isinstance(what, str):
        bare = re.sub(r"(?<!\[)\^", "", what)
        return f"^{re.escape(prefix)}(?:{bare})"
    if isinstance(what, list | tuple):
        return [(below(prefix, pattern), order) for pattern, order in what]
    return what
