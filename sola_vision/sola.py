# SPDX-License-Identifier: Apache-2.0
"""Registration of the family with timm: `timm.create_model("sola_tiny", ...)`. timm lists it as module "sola"."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
    register_notrace_module,
)
from torch import Tensor, nn

from sola_vision import config, layers
from sola_vision.backbone import SolaVision
from sola_vision.layers import resize_position

# modules whose forward reads shapes or chooses a kernel are leaves for torch.fx, as in timm
register_notrace_module(layers.PositionEmbedding)
register_notrace_module(layers.HiddenStateBridge)
register_notrace_module(layers.LinearLayer)
register_notrace_module(layers.SoftmaxMixer)


def default_cfg(**changes: Any) -> dict[str, Any]:
    """timm's pretrained configuration for a network without published weights."""
    return {
        "url": "",  # no published weights: pretrained=True logs a warning
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "fixed_input_size": False,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "stem.proj",
        "classifier": "head.fc",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2601.11164",
        **changes,
    }


default_cfgs = generate_default_cfgs(
    {f"sola_{size}.untrained": default_cfg() for size in ("nano", "tiny", "small", "base")}
)


def _one_side(arguments: dict[str, Any]) -> dict[str, Any]:
    """Replace an img_size of (height, width), timm's form, by one number. Raises TypeError unless it is square."""
    sides = arguments.get("img_size")
    if not isinstance(sides, list | tuple):
        return arguments
    if len(set(sides)) != 1:
        raise TypeError(
            f"img_size={sides}: the position embedding's grid is square; use one number (images may have any size)"
        )
    return {**arguments, "img_size": sides[0]}


def fit_position(stored: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook for loading weights: resize the position embedding to the network's grid."""
    own = model.get_parameter("position.weight")
    weight = stored.get("position.weight")
    if weight is None or weight.shape[:-2] != own.shape[:-2]:
        return stored
    return {**stored, "position.weight": resize_position(weight, own.shape[-2:])}


def _check_getter(arguments: dict[str, Any], why: str) -> None:
    """Raise ValueError for timm's other feature extractors, which fail or return other maps."""
    if arguments.get("feature_cls", "getter") != "getter":
        raise ValueError(
            f"feature_cls={arguments['feature_cls']!r}: {why}, so feature maps come from forward_intermediates; "
            "omit feature_cls or use 'getter'"
        )


def create(
    kind: Callable[..., nn.Module],
    preset: Any,
    name: str,
    pretrained: bool,
    arguments: dict[str, Any],
    *,
    out_indices: int | tuple[int, ...],
    why_getter: str,
    filter_fn: Callable[..., dict[str, Tensor]],
) -> Any:
    """Build the network `kind(config)` as timm builds its own, with the arguments of create_model.

    preset: the config of the name, whose fields are arguments. out_indices: the maps that `features_only` returns by
    default. why_getter: the reason why they come from `forward_intermediates`. filter_fn: timm's hook for loading
    weights.
    """

    def build(
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> nn.Module:
        # the remaining arguments are fields of the config; an unknown name is a TypeError
        configured = replace(preset, **_one_side(changes))
        return kind(configured, global_pool=global_pool, drop_rate=drop_rate, device=device, dtype=dtype)

    _check_getter(arguments, why_getter)
    if arguments.get("features_only"):
        arguments.pop("global_pool", None)  # of the head, which timm removes
    feature_cfg = {"out_indices": out_indices, "feature_cls": "getter"}
    return build_model_with_cfg(
        build, name, pretrained, feature_cfg=feature_cfg, pretrained_filter_fn=filter_fn, **arguments
    )


def _create(name: str, preset: config.SolaConfig, pretrained: bool, **kwargs: Any) -> SolaVision:
    stages = len(kwargs.get("dims") or preset.dims)
    return create(
        SolaVision,
        preset,
        name,
        pretrained,
        kwargs,
        out_indices=tuple(range(stages)),
        why_getter="bridges cross the stages",
        filter_fn=fit_position,
    )


@register_model
def sola_nano(pretrained: bool = False, **kwargs: Any) -> SolaVision:
    """1.65 M parameters without head, for quick starts and studies; every field of SolaConfig is an argument."""
    return _create("sola_nano", config.nano(), pretrained, **kwargs)


@register_model
def sola_tiny(pretrained: bool = False, **kwargs: Any) -> SolaVision:
    """SoLA-T of Table 7, with its bridges by bridges="paper"; every field of SolaConfig is an argument."""
    return _create("sola_tiny", config.tiny(), pretrained, **kwargs)


@register_model
def sola_small(pretrained: bool = False, **kwargs: Any) -> SolaVision:
    """SoLA-S of Table 7, with its bridges by bridges="paper"; every field of SolaConfig is an argument."""
    return _create("sola_small", config.small(), pretrained, **kwargs)


@register_model
def sola_base(pretrained: bool = False, **kwargs: Any) -> SolaVision:
    """SoLA-B of Table 7, with its bridges by bridges="paper"; every field of SolaConfig is an argument."""
    return _create("sola_base", config.base(), pretrained, **kwargs)
