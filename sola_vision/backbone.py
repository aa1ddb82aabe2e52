# SPDX-License-Identifier: Apache-2.0
"""The network: stem, position embedding, stages of linear and softmax layers, bridges between them, head (Fig. 4a).

    image [B, 3, H, W] -> Stem -> [B, H/4, W/4, C1] -> Stage 1 -> ... -> Stage 4 -> [B, H/32, W/32, C4] -> norm -> head

Activations are [B, H, W, C]; only images and feature maps are NCHW, as timm's contract requires.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers import ClassifierHead, calculate_drop_path_rates, get_device_dtype, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sola_vision.config import SolaConfig
from sola_vision.layers import (
    HiddenStateBridge,
    LayerNorm,
    LinearLayer,
    PatchMerging,
    PositionEmbedding,
    SoftmaxLayer,
    Stem,
)
from sola_vision.layers.replaced import LAYER_RESULTS, two_results
from sola_vision.schedule import Bridge, Layer

# outputs of the operator in the layers that bridges start from
States = dict[Layer, Tensor]


class Stage(nn.Module):
    """Patch merging (except in the first stage), then layers at one resolution and the bridges that end in them."""

    def __init__(
        self,
        index: int,
        merge: nn.Module,
        layers: Sequence[nn.Module],
        bridges: Sequence[tuple[Bridge, HiddenStateBridge]],
        carried: frozenset[Layer],
    ) -> None:
        super().__init__()
        self.index = index
        self.merge = merge
        self.layers = nn.ModuleList(layers)
        self.bridges = nn.ModuleList(module for _, module in bridges)
        self.bridge_ends = tuple(bridge for bridge, _ in bridges)
        self.carried = carried  # the linear layers of the whole network whose state a bridge reads
        self.grad_checkpointing = False

    def forward(self, x: Tensor, states: States) -> tuple[Tensor, States]:
        """The previous stage's map [B, H, W, C] -> this stage's [B, H', W', C'], and the states including its own."""
        x = self.merge(x)
        for number, layer in enumerate(self.layers):
            here = Layer(self.index, number)
            arriving = [
                bridge(x, states[ends.source])
                for ends, bridge in zip(self.bridge_ends, self.bridges, strict=True)
                if ends.target == here
            ]
            x = sum(arriving, x)
            if self.grad_checkpointing and torch.is_grad_enabled():
                returned = checkpoint(layer, x, use_reentrant=False)
            else:
                returned = layer(x)
            x, state = two_results(returned, layer, LAYER_RESULTS)
            if here in self.carried:
                states = {**states, here: state}
        return x, states


class SolaVision(nn.Module):
    """A SoLA-Vision classifier, and a backbone that follows timm's contract.

    image [B, in_chans, H, W] of any size from 1 x 1 -> logits [B, num_classes]; with num_classes=0 [B, C4], or
    [B, 2 C4] if the pool is "catavgmax". Raises ValueError for a classifier without a pool, and for an image of another
    rank or number of channels, or without pixels.

        network = SolaVision(sola_vision.tiny(bridges="paper", num_classes=10))

    Args:
        config: the architecture.
        global_pool: the head's pooling: "avg", "max", "avgmax", "catavgmax"; "" keeps the map (num_classes=0 only).
        drop_rate: dropout before the classifier.
        device, dtype: where and in which dtype the parameters are created.
    """

    def __init__(
        self,
        config: SolaConfig,
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
        self.num_features = config.dims[-1]

        self.stem = Stem(config.in_chans, config.dims[0], patch_size=config.patch_size, **dd)
        self.position = PositionEmbedding(-(-config.img_size // config.patch_size), config.dims[0], **dd)
        bridges = config.parsed_bridges.bridges
        carried = frozenset(bridge.source for bridge in bridges)
        drop_path = iter(calculate_drop_path_rates(config.drop_path_rate, len(config.parsed_schedule.layers)))
        self.stages = nn.ModuleList()
        self.feature_info = []
        for index, (kinds, dim) in enumerate(zip(config.parsed_schedule.stages, config.dims, strict=True)):
            merge = PatchMerging(config.dims[index - 1], dim, **dd) if index else nn.Identity()
            layers: list[nn.Module] = [
                LinearLayer(dim, token_shift=config.token_shift, drop_path=next(drop_path), **dd)
                if kind == "L"
                else SoftmaxLayer(dim, head_dim=config.head_dim, drop_path=next(drop_path), **dd)
                for kind in kinds
            ]
            arriving = [
                (bridge, HiddenStateBridge(config.dims[bridge.source.stage], dim, **dd))
                for bridge in bridges
                if bridge.target.stage == index
            ]
            self.stages.append(Stage(index, merge, layers, arriving, carried))
            self.feature_info.append({"num_chs": dim, "reduction": config.strides[index], "module": f"stages.{index}"})
        # not in the paper: the head, as in Swin: norm, mean over the tokens, one linear layer
        self.norm: nn.Module = LayerNorm(config.dims[-1], **dd)
        check_pool(global_pool, config.num_classes)
        self.head = ClassifierHead(config.dims[-1], config.num_classes, global_pool, drop_rate, **dd)
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()  # twice with "catavgmax"
        self.apply(_initialise)
        # not in the paper: residual branches and the head start near zero, so the network starts near the identity
        # (docs/log.md)
        for module in self.modules():
            if isinstance(module, LinearLayer | SoftmaxLayer):
                for projection in module.branch_outputs():
                    trunc_normal_(projection.weight, std=0.02)
        if isinstance(self.head.fc, nn.Linear):
            trunc_normal_(self.head.fc.weight, std=0.02)

    def forward_features(self, image: Tensor) -> Tensor:
        """image [B, in_chans, H, W] -> the last feature map, normalised, [B, C4, H/32, W/32]."""
        x = self.position(self.stem(image))
        states: States = {}
        for stage in self.stages:
            x, states = stage(x, states)
        return nchw(self.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, C4, H/32, W/32] -> logits [B, num_classes], or pooled features [B, C4] with `pre_logits`."""
        return self.head(x, pre_logits=pre_logits)

    def forward(self, image: Tensor) -> Tensor:
        """image [B, in_chans, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(image))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NHWC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """timm's method: (final map, list of the stages' maps [B, C_i, H_i, W_i]), or only the list with
        `intermediates_only`. indices: the last n stages, a list of stages, or None for all; norm: normalise the last
        stage's map; stop_early: skip the stages after the last requested one.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"output_fmt={output_fmt!r} must be 'NCHW' or 'NHWC'")
        shaped = nchw if output_fmt == "NCHW" else torch.Tensor.contiguous
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.position(self.stem(x))
        stages = self.stages[: last + 1] if stop_early else self.stages
        complete = len(stages) == len(self.config.dims)  # `norm` is made for the last stage's channels
        states: States = {}
        maps = []
        for index, stage in enumerate(stages):
            x, states = stage(x, states)
            if index in take:
                maps.append(shaped(self.norm(x) if norm and index == len(self.config.dims) - 1 else x))
        if intermediates_only:
            return maps
        return shaped(self.norm(x) if complete else x), maps

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages and the head that the feature maps `indices` do not need; return the indices kept."""
        take, last = feature_take_indices(len(self.stages), indices)
        cut = last < len(self.stages) - 1
        if prune_norm or cut:
            self.norm = nn.Identity()
        self.stages = self.stages[: last + 1]
        if cut:
            self.num_features = self.config.dims[last]
        if prune_head or cut:
            self.reset_classifier(0, "")
        return take

    def get_classifier(self) -> nn.Module:
        """The head's projection; nn.Identity without one."""
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one with `num_classes` outputs (0: none)."""
        check_pool(self.head.global_pool.pool_type if global_pool is None else global_pool, num_classes)
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, in_features=self.num_features, **get_device_dtype(self))
        self.head_hidden_size = self.num_features * self.head.global_pool.feat_mult()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer's activations in the backward instead of keeping them."""
        for stage in self.stages:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters that timm's optimisers exempt from weight decay, in addition to vectors and biases."""
        return {"position.weight"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's parameter groups for layer-wise learning-rate decay: the stem, then each layer with its inputs."""
        layers = [
            (r"^stages\.(\d+)\.merge", (0,)),
            (r"^stages\.(\d+)\.layers\.(\d+)", None),
            (r"^stages\.(\d+)\.bridges", (0,)),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem|^position", "blocks": r"^stages\.(\d+)" if coarse else layers}


def nchw(x: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, C, H, W], contiguous."""
    return x.permute(0, 3, 1, 2).contiguous()


def check_pool(global_pool: str, num_classes: int) -> None:
    """Raise ValueError for a classifier on an unpooled map, which would fail at the first image."""
    if global_pool == "" and num_classes:
        raise ValueError(
            f"global_pool='' keeps the feature map, which a classifier (num_classes={num_classes}) cannot take: "
            "use num_classes=0, or another global_pool"
        )


def _initialise(module: nn.Module) -> None:
    """Variance-preserving weights; the layers initialise decay, bonus and interpolations themselves."""
    if isinstance(module, nn.Linear):
        # not in the paper: ViT's and Swin's std of 0.02 suits widths near 768; narrow networks learn faster from
        # variance-preserving weights (docs/log.md)
        trunc_normal_(module.weight, std=module.in_features**-0.5)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, PositionEmbedding):
        trunc_normal_(module.weight, std=0.02)
