# SPDX-License-Identifier: Apache-2.0
"""The backbone as dense tasks see it: four normalised feature maps, at strides 4, 8, 16 and 32 of any image.

It is timm's `features_only` network, sola_* or any other with four levels, and a LayerNorm on each map. Parameter
groups (layer-wise decay, no weight decay) are the backbone's own, found below a prefix.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.layers import LayerNorm2d
from torch import Tensor, nn

from sola_vision.engine import LoadReport
from sola_vision.layers import resize_position

_LEVELS = 4


class Pyramid(nn.Module):
    """image [B, 3, H, W] -> list of four maps [B, C_i, ceil(H / stride), ceil(W / stride)]."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        info: Any = body.feature_info
        channels, strides = list(info.channels()), list(info.reduction())
        # networks of timm that begin at stride 2 have a fifth map, which no head here asks for
        self.channels: list[int] = channels[-_LEVELS:]
        self.strides: list[int] = strides[-_LEVELS:]
        if any(after != 2 * before for before, after in zip(self.strides, self.strides[1:], strict=False)) or (
            len(self.strides) < _LEVELS
        ):
            raise ValueError(
                f"its feature maps have strides {', '.join(map(str, strides))}: dense tasks need four, "
                "each twice the one before; choose a hierarchical network such as sola_tiny"
            )
        self.body = body
        # not in the paper: residual stages end unnormalised, so every map gets a LayerNorm, as Swin's dense models have
        self.norms = nn.ModuleList(LayerNorm2d(count) for count in self.channels)

    def forward(self, image: Tensor) -> list[Tensor]:
        maps = self.body(image)[-_LEVELS:]
        return [norm(x) for norm, x in zip(self.norms, maps, strict=True)]

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


def below(prefix: str, what: Any) -> Any:
    """A specification of timm's group matcher for names that begin with `prefix`."""
    if isinstance(what, str):
        bare = re.sub(r"(?<!\[)\^", "", what)
        return f"^{re.escape(prefix)}(?:{bare})"
    if isinstance(what, list | tuple):
        return [(below(prefix, pattern), order) for pattern, order in what]
    return what
