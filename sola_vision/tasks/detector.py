# SPDX-License-Identifier: Apache-2.0
"""Detectors built from a configuration, a classifier's checkpoint or a detector's checkpoint: Mask R-CNN over the four
feature maps of the backbone, or Faster R-CNN without masks.

    images -> Pyramid (strides 4, 8, 16, 32) -> FPN -> proposals (strides 4 .. 64) -> boxes, masks (strides 4 .. 32)
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from sola_vision.data import DetectionConfig
from sola_vision.engine import LoadReport, load_weights, read_weights
from sola_vision.tasks.model import (
    ModelConfig,
    foreign_metadata,
    network_changes,
    read_description,
    read_network,
    read_settings,
    weights_file,
)
from sola_vision.tasks.pyramid import Pyramid, create_body
from sola_vision.tasks.rcnn import (
    AlignedRoIAlign,
    FixedAnchors,
    FloatRPNHead,
    L1RegionProposals,
    L1RoIHeads,
    Preparation,
)
from sola_vision.wording import amount

_STRIDES = (4, 8, 16, 32)
_GRID = 224  # image size of the position embedding, as for the classifiers; it is interpolated for other sizes
_PADDED = (64, 96)  # test size of the backbone: images are padded to multiples of 32 pixels


@dataclass(kw_only=True)
class DetectorConfig:
    """Settings of a detector except its backbone, and of how the backbone is trained.

    Args:
        channels: channels of the feature pyramid and of the mask head.
        box_channels: channels of the two layers that classify a box.
        group_norm: normalise the pyramid and the mask head, for training from scratch.
        anchor_scale: side of a square anchor divided by the stride of its level; 8 gives 32 to 512 pixels.
        proposals: boxes per image that are passed to the second stage.
        samples: proposals per image that the second stage is trained on.
        max_detections: maximum number of objects reported per image, and maxDets of the evaluation.
        score_threshold: detections with a lower score are not reported.
        nms_threshold: of two boxes of a class with a higher IoU, the one with the lower score is dropped.
        frozen_stages: number of stages that, with the stem, keep their initial weights; 0 = all are trained.
        checkpointing: recompute the backbone's activations in the backward pass instead of keeping them.
        drop_bridges: leave out the bridges of the checkpoint that training starts from.
    """

    channels: int = 256
    box_channels: int = 1024
    group_norm: bool = False
    anchor_scale: float = 8.0
    proposals: int = 1000
    samples: int = 512
    max_detections: int = 100
    score_threshold: float = 0.05
    nms_threshold: float = 0.5
    frozen_stages: int = 0
    checkpointing: bool = False
    drop_bridges: bool = False

    def __post_init__(self) -> None:
        for name in ("channels", "box_channels", "proposals", "samples", "max_detections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.group_norm and self.channels % 8:
            raise ValueError(f"channels={self.channels} must be a multiple of 8 for group_norm")
        if not self.anchor_scale > 0:
            raise ValueError(f"anchor_scale={self.anchor_scale} must be above 0")
        for name in ("score_threshold", "nms_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")


class FeaturePyramid(nn.Module):
    """images [B, 3, H, W] -> {"0" .. "3": strides 4 to 32, "pool": stride 64}, each [B, channels, h, w]."""

    def __init__(self, pyramid: Pyramid, channels: int, norm: Callable[[int], nn.Module] | None) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.fpn = FeaturePyramidNetwork(pyramid.channels, channels, LastLevelMaxPool(), norm)
        self.out_channels = channels

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(OrderedDict((str(level), x) for level, x in enumerate(self.pyramid(images))))


class Detector(GeneralizedRCNN):
    """Mask R-CNN or Faster R-CNN on lists of uint8 images [3, H, W] of any size.

    In training, (images, targets) -> losses by name. In evaluation, images -> a list of {"boxes" [n, 4], "labels" [n],
    "scores" [n], "masks" [n, 28, 28] over the boxes}, highest score first.
    """

    def __init__(self, body: nn.Module, num_classes: int, config: DetectorConfig, image: DetectionConfig) -> None:
        """`num_classes` excludes the background; masks are learned unless image.masks is false."""
        norm = _group_norm if config.group_norm else None
        pyramid = Pyramid(body)
        if tuple(pyramid.strides) != _STRIDES:
            raise ValueError(f"its feature maps have the strides {pyramid.strides}, but Mask R-CNN needs {_STRIDES}")
        backbone = FeaturePyramid(pyramid, config.channels, norm)
        anchors = FixedAnchors((*_STRIDES, 64), config.anchor_scale, (0.5, 1.0, 2.0))
        limits = {"training": config.proposals, "testing": config.proposals}
        rpn = L1RegionProposals(
            anchors,
            FloatRPNHead(config.channels, 3),
            *(0.7, 0.3, 256, 0.5),  # IoU of objects and background, anchors sampled, share of objects among them
            pre_nms_top_n={"training": 2 * config.proposals, "testing": config.proposals},
            post_nms_top_n=limits,
            nms_thresh=0.7,
        )
        classes = num_classes + 1
        heads = L1RoIHeads(
            AlignedRoIAlign(7, _STRIDES),
            TwoMLPHead(config.channels * 7**2, config.box_channels),
            FastRCNNPredictor(config.box_channels, classes),
            *(0.5, 0.5, config.samples, 0.25, None),  # the same for the second stage, and the default box weights
            config.score_threshold,
            config.nms_threshold,
            config.max_detections,
        )
        if image.masks is not False:
            heads.mask_roi_pool = AlignedRoIAlign(14, _STRIDES)
            heads.mask_head = MaskRCNNHeads(config.channels, [config.channels] * 4, 1, norm)
            heads.mask_predictor = MaskRCNNPredictor(config.channels, config.channels, classes)
        super().__init__(backbone, rpn, heads, Preparation(image))
        nn.init.normal_(heads.box_predictor.cls_score.weight, std=0.01)
        nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=0.001)
        for layer in (heads.box_predictor.cls_score, heads.box_predictor.bbox_pred):
            nn.init.zeros_(layer.bias)
        if config.frozen_stages:
            pyramid.freeze(config.frozen_stages)
        if config.checkpointing:
            pyramid.set_grad_checkpointing()

    @property
    def pyramid(self) -> Pyramid:
        """The backbone with its normalised feature maps."""
        return self.backbone.pyramid

    @property
    def has_masks(self) -> bool:
        """True if the detector has a mask head."""
        return self.roi_heads.has_mask()

    def no_weight_decay(self) -> set[str]:
        """Return the names of the backbone's parameters without weight decay."""
        return self.pyramid.no_weight_decay("backbone.pyramid")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's groups for layer-wise decay: the backbone's; all other parameters use the full rate."""
        return self.pyramid.group_matcher("backbone.pyramid")


@dataclass(frozen=True)
class DetectorCheckpoint:
    """A trained detector with the metadata of its file; category_ids are those of its training data, by class."""

    model: Detector
    name: str
    classes: list[str]
    category_ids: list[int]
    image: DetectionConfig
    detector: DetectorConfig


def build_detector(model: ModelConfig, detector: DetectorConfig, image: DetectionConfig, num_classes: int) -> Detector:
    """Return a detector with newly initialised weights."""
    return _create(model.name, network_changes(model, _GRID), detector, image, num_classes)


def _create(
    name: str, changes: dict[str, Any], detector: DetectorConfig, image: DetectionConfig, num_classes: int
) -> Detector:
    try:
        return Detector(create_body(name, changes, _PADDED), num_classes, detector, image)
    except ValueError as error:
        raise ValueError(f"{name} cannot be the backbone of a detector: {error}") from None


def load_detector(path: str | Path) -> DetectorCheckpoint:
    """Load a detector written by this package, from a file or a run's folder (its best weights), in evaluation mode.

    Raise FileNotFoundError or ValueError if it is missing, damaged, or written by another program or for another task.
    """
    path, values = read_description(path)
    if values["task"] != "detection":
        raise ValueError(f"{path} is a checkpoint of the task {values['task']!r}: use a checkpoint of a detector")
    try:
        image = read_settings(DetectionConfig, values["image"])
        detector = read_settings(DetectorConfig, values["detector"])
        classes = [str(label) for label in values["classes"]]
        ids = [int(number) for number in values["category_ids"]]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise foreign_metadata(path, error) from None
    if len(ids) != len(classes):
        what = f"{amount(len(classes), 'class', 'classes')} but {amount(len(ids), 'category id')}"
        raise foreign_metadata(path, what)
    name, network = read_network(path, values)
    model = _create(name, network, detector, image, len(classes))
    load_weights(model, path)
    return DetectorCheckpoint(model.eval(), name, classes, ids, image, detector)


def start_detector(model: Detector, path: str | Path, classes: Sequence[str], drop_bridges: bool) -> str:
    """Initialise `model` from a classifier's or a detector's weights; return a one-line description.

    From a detector, layers that depend on the classes are newly initialised if the classes differ, and the mask head if
    the checkpoint has none.
    """
    path = weights_file(path)
    stored = read_weights(path)
    if not any(name.startswith("backbone.pyramid.") for name in stored):
        return model.pyramid.start_from(stored, path, drop_bridges)
    own = model.state_dict()
    stored_classes = read_description(path)[1]["classes"] if path.suffix == ".safetensors" else None
    fresh = [name for name in own if name.startswith("roi_heads.mask_") and name not in stored]
    if stored_classes != list(classes):
        fresh += [name for name in own if ".box_predictor." in name or "mask_fcn_logits" in name]
    stored = {name: value for name, value in stored.items() if name in own or not name.startswith("roi_heads.mask_")}
    stored |= {name: own[name] for name in fresh}
    report = LoadReport.of(own, stored)
    if report:
        raise ValueError(f"{path} does not fit the detector: {report}; use a checkpoint of the same network")
    model.load_state_dict(stored)
    return f"weights from {path}" + (f" ({len(set(fresh))} of {len(own)} tensors newly initialised)" if fresh else "")


def _group_norm(channels: int) -> nn.Module:
    # not in the paper: groups of 8 channels; batches of few images are too small for batch normalisation
    return nn.GroupNorm(channels // 8, channels)


def backbone_of(model: Detector) -> nn.Module:
    """Return timm's network inside, whose configuration is stored in a checkpoint."""
    return model.pyramid.network


@torch.inference_mode()
def detect(model: Detector, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Run the model on each image alone: padding to a common size would change the result of attention."""
    return [model([image])[0] for image in images]
