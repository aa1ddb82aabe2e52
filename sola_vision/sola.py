# SPDX-License-Identifier: Apache-2.0
"""The family in timm's registry: `timm.create_model("sola_tiny", ...)`; it files them under this module's name."""

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
from sola_vision.backbone import SolaVision, check_pool
from sola_vision.layers import resize_position

# what looks at sizes is a leaf for torch.fx, as timm's own models have it
register_notrace_module(layers.PositionEmbedding)
register_notrace_module(layers.HiddenStateBridge)
register_notrace_module(layers.LinearLayer)


def default_cfg(**changes: Any) -> dict[str, Any]:
    """timm's description of a network without published weights."""
    return {
        "url": "",  # no weights are published: pretrained=True says so
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


def one_side(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a network with an img_size (height, width), as timm notes it, as one number."""
    sides = arguments.get("img_size")
    if not isinstance(sides, list | tuple):
        return arguments
    if len(set(sides)) != 1:
        raise TypeError(
            f"img_size={sides}: positions are laid out on a square; give one number, any size of image works"
        )
    return {**arguments, "img_size": sides[0]}


def fit_position(stored: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """timm's hook for weights that are loaded: the position embedding is laid out for the network's own image size."""
    own = model.get_parameter("position.weight")
    weight = stored.get("position.weight")
    if weight is None or weight.shape[:-2] != own.shape[:-2]:
        return stored
    return {**stored, "position.weight": resize_position(weight, own.shape[-2:])}


def check_getter(arguments: dict[str, Any], why: str) -> None:
    """Refuses timm's other ways to feature maps, which give none or others."""
    if arguments.get("feature_cls", "getter") != "getter":
        raise ValueError(
            f"feature_cls={arguments['feature_cls']!r}: {why}, so feature maps come from forward_intermediates; "
            "leave feature_cls out or give 'getter'"
        )


def _create(name: str, size: config.SolaConfig, pretrained: bool, **kwargs: Any) -> SolaVision:
    def build(
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **changes: Any,
    ) -> SolaVision:
        # what is left must be a field of SolaConfig: an unknown name is a TypeError
        built = size.with_changes(**one_side(changes))
        return SolaVision(built, global_pool=global_pool, drop_rate=drop_rate, device=device, dtype=dtype)

    check_getter(kwargs, "bridges cross the stages")
    if not kwargs.get("features_only"):
        check_pool(kwargs.get("global_pool"), kwargs.get("num_classes", size.num_classes))
    stages = len(kwargs.get("dims") or size.dims)
    feature_cfg = {"out_indices": tuple(range(stages)), "feature_cls": "getter"}
    return build_model_with_cfg(
        build, name, pretrained, feature_cfg=feature_cfg, pretrained_filter_fn=fit_position, **kwargs
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
