# SPDX-License-Identifier: Apache-2.0
"""Vision-RWKV built from our layers, for its published weights: an isotropic stack of linear layers, patch size 16.

    image [B, 3, H, W] -> patches -> + position -> norm -> layers, all [B, H/16, W/16, C] -> norm -> mean -> head

`vrwkv_tiny`, `vrwkv_small`, `vrwkv_base` and `vrwkv_large` are registered with timm and also load the keys of the
original files (`checkpoint_filter_fn`). Source: Duan et al., Vision-RWKV, arXiv 2403.02308, and its published settings.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.layers import (
    ClassifierHead,
    NormMlpClassifierHead,
    calculate_drop_path_rates,
    get_device_dtype,
    trunc_normal_,
)
from timm.models import generate_default_cfgs, register_model, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sola_vision.backbone import check_pool, nchw
from sola_vision.layers import PositionEmbedding, Stem
from sola_vision.layers.vision_rwkv import VisionRwkvLayer
from sola_vision.sola import create, default_cfg, fit_position
from sola_vision.vrwkv_weights import renamed

# modules whose forward reads shapes are leaves for torch.fx, as in timm
register_notrace_module(VisionRwkvLayer)


@dataclass(frozen=True, kw_only=True)
class VrwkvConfig:
    """The architecture of a Vision-RWKV network. Raises ValueError for inconsistent fields.

    dim, depth: channels, a multiple of 4, and number of layers.
    layer_scale: initial scale of the residual branches, which are then normalised after their mix, as in all published
        networks that have a scale; None: no scale, normalised before the mix.
    key_norm: normalise the operator's result and the squared ReLU as well.
    head_hidden: width of the head's hidden layer; 0: none.
    img_size: image side in pixels that defines the position embedding's grid; it is interpolated for other sizes.
    eq9: use eq. 9 and its kernels instead of the published operator (docs/weights.md: how far they differ).
    """

    dim: int
    depth: int = 12
    layer_scale: float | None = None
    key_norm: bool = False
    head_hidden: int = 0
    patch_size: int = 16
    img_size: int = 224
    in_chans: int = 3
    num_classes: int = 1000
    drop_path_rate: float = 0.0
    eq9: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "patch_size", "img_size", "in_chans"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.dim % 4:
            raise ValueError(f"dim={self.dim} must be a multiple of 4: each neighbour gets a quarter of the channels")
        if self.num_classes < 0 or self.head_hidden < 0:
            raise ValueError(f"num_classes={self.num_classes} and head_hidden={self.head_hidden} must not be negative")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={self.drop_path_rate} must be in [0, 1)")


class VisionRwkv(nn.Module):
    """A Vision-RWKV classifier, and a backbone that follows timm's contract.

    image [B, in_chans, H, W] of any size from 1 x 1 -> logits [B, num_classes], or [B, C] with num_classes=0.
    """

    def __init__(
        self,
        config: VrwkvConfig,
        *,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.config = config
        self.num_classes = config.num_classes
        self.in_chans = config.in_chans
        self.num_features = config.dim
        self.grad_checkpointing = False

        self.stem = Stem(config.in_chans, config.dim, patch_size=config.patch_size, **dd)
        self.stem.norm = nn.Identity()  # here the norm comes after the position embedding
        self.position = PositionEmbedding(-(-config.img_size // config.patch_size), config.dim, **dd)
        self.norm_in = nn.LayerNorm(config.dim, **dd)
        self.layers = nn.ModuleList(
            VisionRwkvLayer(
                config.dim, scale=config.layer_scale, key_norm=config.key_norm, eq9=config.eq9, drop_path=rate, **dd
            )
            for rate in calculate_drop_path_rates(config.drop_path_rate, config.depth)
        )
        self.feature_info = [
            {"num_chs": config.dim, "reduction": config.patch_size, "module": f"layers.{index}"}
            for index in range(config.depth)
        ]
        self.norm: nn.Module = nn.LayerNorm(config.dim, **dd)
        if not config.head_hidden:  # a hidden layer's head classifies every position of an unpooled map
            check_pool(global_pool, config.num_classes)
        self.head: Any = (
            NormMlpClassifierHead(
                config.dim, config.num_classes, config.head_hidden, global_pool, drop_rate, nn.Identity, "tanh", **dd
            )
            if config.head_hidden
            else ClassifierHead(config.dim, config.num_classes, global_pool, drop_rate, **dd)
        )
        self.head_hidden_size = self.config.head_hidden or self.num_features * self.head.global_pool.feat_mult()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Vision-RWKV's initialisation: decays and interpolations depend on depth; weights are normal with std 0.02."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        channel = torch.arange(self.config.dim, dtype=torch.float32, device=self.position.weight.device)
        ramp = channel / self.config.dim
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, VisionRwkvLayer)
            mixer, channels = layer.mixer, layer.channel_mix
            depth, left = number / max(1, len(self.layers) - 1), 1 - number / len(self.layers)
            mixer.decay.copy_(-5 + 8 * (channel / max(1, self.config.dim - 1)) ** (0.7 + 1.3 * depth))
            mixer.bonus.copy_(math.log(0.3) + ((channel + 1) % 3 - 1) / 2)
            mixer.mix_key.copy_(ramp**left)
            mixer.mix_value.copy_(ramp**left + 0.3 * depth)
            mixer.mix_receptance.copy_(ramp ** (0.5 * left))
            channels.mix_key.copy_(ramp**left)
            channels.mix_receptance.copy_(ramp**left)

    def forward_features(self, image: Tensor) -> Tensor:
        """image [B, in_chans, H, W] -> the last feature map, normalised, [B, C, H/16, W/16]."""
        x = self._embed(image)
        for layer in self.layers:
            x = self._run(layer, x)
        return nchw(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, C, H/16, W/16] -> logits [B, num_classes], or pooled features with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, image: Tensor) -> Tensor:
        """image [B, in_chans, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(image))

    def _embed(self, image: Tensor) -> Tensor:
        return self.norm_in(self.position(self.stem(image)))

    def _run(self, layer: nn.Module, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, x, use_reentrant=False)
        return layer(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NHWC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's method: (final map, list of the layers' maps [B, C, H/16, W/16]), or only the list with
        `intermediates_only`. indices: the last n layers, a list of layers, or None for all; norm: normalise every map.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r} must be 'NCHW' or 'NHWC'")
        shaped = nchw if output_fmt == "NCHW" else torch.Tensor.contiguous
        take, last = feature_take_indices(len(self.layers), indices)
        x = self._embed(x)
        maps = []
        for index, layer in enumerate(self.layers[: last + 1] if stop_early else self.layers):
            x = self._run(layer, x)
            if index in take:
                maps.append(shaped(self.norm(x) if norm else x))
        return maps if intermediates_only else (shaped(self.norm(x)), maps)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers and the head that the feature maps `indices` do not need; return the indices kept."""
        take, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """The head's projection; nn.Identity without one."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one with `num_classes` outputs (0: none)."""
        if not self.config.head_hidden:
            check_pool(self.head.global_pool.pool_type if global_pool is None else global_pool, num_classes)
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))
        self.head_hidden_size = self.config.head_hidden or self.num_features * self.head.global_pool.feat_mult()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer's activations in the backward instead of keeping them."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimisers exempt from weight decay, in addition to vectors and biases."""
        return {"position.weight"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups for layer-wise learning-rate decay: the stem, then each layer."""
        return {"stem": r"^stem|^position|^norm_in", "blocks": [(r"^layers\.(\d+)", None), (r"^norm\.", (99999,))]}


def checkpoint_filter_fn(stored: dict[str, Tensor], model: VisionRwkv) -> dict[str, Tensor]:
    """timm's hook for loading weights: rename published keys, resize the position embedding to the network's grid."""
    return fit_position(renamed(stored), model)


# fmt: off
_TINY  = VrwkvConfig(dim=192)
_SMALL = VrwkvConfig(dim=384,            layer_scale=1.0,  drop_path_rate=0.3)
_BASE  = VrwkvConfig(dim=768,            layer_scale=1e-5, drop_path_rate=0.5)
# trained on ImageNet-22K with 192 pixels, then with 384 on the same position embedding
_LARGE = VrwkvConfig(dim=1024, depth=24, layer_scale=1e-5, drop_path_rate=0.1, key_norm=True, head_hidden=3072,
                     img_size=192)
# fmt: on

_PAPER = {"paper_ids": "arXiv:2403.02308", "pool_size": (14, 14)}
default_cfgs = generate_default_cfgs(
    {f"vrwkv_{size}.untrained": default_cfg(**_PAPER) for size in ("tiny", "small", "base")}
    | {"vrwkv_large.untrained": default_cfg(**{**_PAPER, "input_size": (3, 384, 384), "pool_size": (24, 24)})}
)


def _create(name: str, preset: VrwkvConfig, pretrained: bool, **kwargs: Any) -> VisionRwkv:
    return create(
        VisionRwkv,
        preset,
        name,
        pretrained,
        kwargs,
        out_indices=3,
        why_getter="the layers' maps are channels-last",
        filter_fn=checkpoint_filter_fn,
    )


@register_model
def vrwkv_tiny(pretrained: bool = False, **kwargs: Any) -> VisionRwkv:
    """VRWKV-T: 6.2 M parameters; every field of VrwkvConfig is an argument."""
    return _create("vrwkv_tiny", _TINY, pretrained, **kwargs)


@register_model
def vrwkv_small(pretrained: bool = False, **kwargs: Any) -> VisionRwkv:
    """VRWKV-S: 23.8 M parameters; every field of VrwkvConfig is an argument."""
    return _create("vrwkv_small", _SMALL, pretrained, **kwargs)


@register_model
def vrwkv_base(pretrained: bool = False, **kwargs: Any) -> VisionRwkv:
    """VRWKV-B: 93.7 M parameters; every field of VrwkvConfig is an argument."""
    return _create("vrwkv_base", _BASE, pretrained, **kwargs)


@register_model
def vrwkv_large(pretrained: bool = False, **kwargs: Any) -> VisionRwkv:
    """VRWKV-L: 334.9 M parameters; every field of VrwkvConfig is an argument."""
    return _create("vrwkv_large", _LARGE, pretrained, **kwargs)
