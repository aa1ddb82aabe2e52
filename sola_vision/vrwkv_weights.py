# SPDX-License-Identifier: Apache-2.0
"""Vision-RWKV's published weight files: recognise them, derive the network from them, rename their tensors.

mmpretrain's files have `backbone.*` and `head.fc.*`; the large network's head has two layers.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_BASE_DIM = 768

# published names -> ours, applied in this order after removing "backbone."
_NAMES = (
    (r"^patch_embed\.projection\.", "stem.proj."),
    (r"^pos_embed$", "position.weight"),
    (r"^layers\.0\.ln0\.", "norm_in."),
    (r"^ln1\.", "norm."),
    (r"^layers\.(\d+)\.ln(\d)\.", r"layers.\1.norm\2."),
    (r"^layers\.(\d+)\.gamma(\d)$", r"layers.\1.scale\2"),
    (r"^(layers\.\d+)\.readout_norm\.", r"\1.mixer.readout_norm."),  # in early files of this package
    (r"^(layers\.\d+)\.hidden_norm\.", r"\1.channel_mix.hidden_norm."),
    (r"\.att\.key_norm\.", ".mixer.readout_norm."),
    (r"\.ffn\.key_norm\.", ".channel_mix.hidden_norm."),
    (r"\.att\.", ".mixer."),
    (r"\.ffn\.", ".channel_mix."),
    (r"\.spatial_decay$", ".decay"),
    (r"\.spatial_first$", ".bonus"),
    (r"\.spatial_mix_k$", ".mix_key"),
    (r"\.spatial_mix_v$", ".mix_value"),
    (r"\.spatial_mix_r$", ".mix_receptance"),
    (r"^head\.0\.", "head.pre_logits.fc."),
    (r"^head\.2\.", "head.fc."),
)


def is_published(stored: Mapping[str, Tensor]) -> bool:
    """True if the tensors have the names of the original repository. Raises ValueError for its Vision-RWKV 6."""
    _refuse_version_6(stored)
    return any(name.removeprefix("backbone.") == "layers.0.att.spatial_decay" for name in stored)


def _refuse_version_6(stored: Mapping[str, Tensor]) -> None:
    if any(name.removeprefix("backbone.") == "layers.0.att.time_decay" for name in stored):
        raise ValueError(
            "these are weights of Vision-RWKV 6, which has another operator: load vrwkv_t, vrwkv_s, vrwkv_b or vrwkv_l"
        )


def from_published(stored: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Return the timm name and the VrwkvConfig fields of the network that published weights belong to."""
    weights = renamed(stored)
    if not {"stem.proj.weight", "position.weight"} <= weights.keys() or weights["position.weight"].ndim != 4:
        raise ValueError("these Vision-RWKV weights lack patch_embed.projection.weight or a square pos_embed")
    dim, in_chans, patch_size, _ = weights["stem.proj.weight"].shape
    head = weights.get("head.fc.weight")
    hidden = weights.get("head.pre_logits.fc.weight")
    scaled, key_norm = "layers.0.scale1" in weights, "layers.0.mixer.readout_norm.weight" in weights
    # fields that a file does not determine, such as the initial scale, are those of the preset
    name = "vrwkv_large" if key_norm else "vrwkv_small" if scaled else "vrwkv_tiny"
    name = "vrwkv_base" if name == "vrwkv_small" and dim == _BASE_DIM else name
    return (
        name,
        {
            "dim": dim,
            "depth": len({key.split(".")[1] for key in weights if re.match(r"layers\.\d+\.", key)}),
            "key_norm": key_norm,
            "head_hidden": 0 if hidden is None else hidden.shape[0],
            "patch_size": patch_size,
            "img_size": patch_size * weights["position.weight"].shape[-1],
            "in_chans": in_chans,
            "num_classes": 0 if head is None else head.shape[0],
        },
    )


def renamed(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape published weights to ours; unknown tensors, and ours, keep their names. Raises ValueError for
    weights of Vision-RWKV 6.
    """
    _refuse_version_6(stored)
    weights = {}
    for published, value in stored.items():
        name = published.removeprefix("backbone.")
        for pattern, ours in _NAMES:
            name = re.sub(pattern, ours, name)
        if name == "position.weight":
            side = round(value.shape[1] ** 0.5) if value.ndim == 3 else 0
            value = value.mT.unflatten(2, (side, side)) if value.ndim == 3 and side**2 == value.shape[1] else value
        elif ".mix_" in name:
            value = value.flatten()  # [1, 1, C]
        weights[name] = value.contiguous()
    return weights
