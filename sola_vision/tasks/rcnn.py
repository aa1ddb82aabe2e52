# SPDX-License-Identifier: Apache-2.0
"""torchvision's Mask R-CNN, changed where it differs from the settings used for published results.

# not in the paper: it says "Mask R-CNN, 1x schedule". Such results usually come from MMDetection, whose settings are
# used here: RoIAlign with half-pixel alignment and as many samples as a bin needs, L1 loss on boxes, anchors at fixed
# strides and not rounded, mask targets that are 0 or 1. Every class below implements one of these, or states its other
# purpose. 1000 proposals in training and small initial weights of the heads are in `detector.py`, pasting masks at
# pixel centres is in `detection.py`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import roi_align

from sola_vision.data import DetectionConfig

_CANONICAL = 56.0  # side in pixels of a box at level 0; it doubles with each level


class AlignedRoIAlign(nn.Module):
    """RoIAlign of each box from the pyramid level that matches its size: a tensor [boxes, C, size, size]."""

    def __init__(self, size: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.output_size = (size, size)
        self.strides = tuple(strides)

    def forward(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        maps = [features[str(level)].float() for level in range(len(self.strides))]
        rois = torch.cat([torch.cat((b.new_full((len(b), 1), i), b), 1) for i, b in enumerate(boxes)]).float()
        sides = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).sqrt()
        levels = torch.floor(torch.log2(sides / _CANONICAL + 1e-6)).clamp(0, len(maps) - 1)
        out = maps[0].new_zeros((len(rois), maps[0].shape[1], *self.output_size))
        for level, (features_here, stride) in enumerate(zip(maps, self.strides, strict=True)):
            chosen = torch.nonzero(levels == level).flatten()
            # also without boxes, so that every map takes part in every backward pass
            cut = roi_align(features_here, rois[chosen], self.output_size, 1 / stride, sampling_ratio=0, aligned=True)
            out = out.index_copy(0, chosen, cut)
        return out


class FixedAnchors(AnchorGenerator):
    """Anchors of one size per level: scale times stride, at each ratio (height / width), at multiples of the stride.

    torchvision instead divides the image size by the map size, which differs from the stride if it is not a multiple.
    """

    def __init__(self, strides: Sequence[int], scale: float, ratios: Sequence[float]) -> None:
        super().__init__(tuple((scale * stride,) for stride in strides), (tuple(ratios),) * len(strides))
        self.strides = tuple(strides)

    def generate_anchors(
        self,
        scales: list[int],
        aspect_ratios: list[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),  # noqa: B008 - torchvision's signature
    ) -> Tensor:
        heights = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        halves = torch.stack((1 / heights, heights), 1)[:, None] * torch.tensor(scales, device=device)[:, None] / 2
        return torch.cat((-halves, halves), 2).flatten(0, 1)

    def forward(self, image_list: Any, feature_maps: list[Tensor]) -> list[Tensor]:
        first = feature_maps[0]
        self.set_cell_anchors(torch.float32, first.device)
        sizes = [list(features.shape[-2:]) for features in feature_maps]
        strides = [[torch.tensor(stride, device=first.device)] * 2 for stride in self.strides]
        together = torch.cat(self.grid_anchors(sizes, strides))
        return [together] * len(image_list.image_sizes)


class FloatRPNHead(RPNHead):
    """RPN head whose outputs are float32, so that boxes are computed in float32 under autocast."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        scores, deltas = super().forward(x)
        return [s.float() for s in scores], [d.float() for d in deltas]


class L1RegionProposals(RegionProposalNetwork):
    """Region proposals with an L1 loss on boxes, where torchvision uses smooth L1 with beta 1/9."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        some_positive, some_negative = self.fg_bg_sampler(labels)
        positive = torch.nonzero(torch.cat(some_positive)).flatten()
        sampled = torch.cat((positive, torch.nonzero(torch.cat(some_negative)).flatten()))
        deltas, targets = pred_bbox_deltas[positive], torch.cat(regression_targets)[positive]
        box_loss = F.l1_loss(deltas, targets, reduction="sum") / max(1, len(sampled))
        score_loss = F.binary_cross_entropy_with_logits(objectness.flatten()[sampled], torch.cat(labels)[sampled])
        return score_loss, box_loss


class L1RoIHeads(RoIHeads):
    """The second stage, with an L1 loss on boxes and binary mask targets."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if not self.training:
            return self._detect(features, proposals, image_shapes), {}
        assert targets is not None
        proposals, matched, labels, deltas = self.select_training_samples(proposals, targets)
        scores, regression = self._boxes(features, proposals, image_shapes)
        losses = dict(zip(("box_class", "box_l1"), _box_losses(scores, regression, labels, deltas), strict=True))
        if self.has_mask():
            positive = [torch.nonzero(some > 0).flatten() for some in labels]
            boxes = [some[index] for some, index in zip(proposals, positive, strict=True)]
            owners = [some[index] for some, index in zip(matched, positive, strict=True)]
            kinds = torch.cat([some[index] for some, index in zip(labels, positive, strict=True)])
            logits = self._masks(features, boxes, image_shapes)
            masks = [target["masks"] for target in targets]
            losses["mask"] = _mask_loss(logits, boxes, owners, kinds, masks)
        return [], losses

    def _detect(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        scores, regression = self._boxes(features, proposals, image_shapes)
        boxes, best, labels = self.postprocess_detections(scores, regression, proposals, image_shapes)
        found = [{"boxes": b, "labels": k, "scores": s} for b, k, s in zip(boxes, labels, best, strict=True)]
        if self.has_mask():
            logits = self._masks(features, boxes, image_shapes)
            kinds = torch.cat(labels)
            probabilities = logits[torch.arange(len(kinds), device=kinds.device), kinds].sigmoid()
            for one, masks in zip(found, probabilities.split([len(b) for b in boxes]), strict=True):
                one["masks"] = masks  # [n, 28, 28], each over its own box
        return found

    def _boxes(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        scores, regression = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        return scores.float(), regression.float()

    def _masks(self, features: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]) -> Tensor:
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))).float()


class Preparation(GeneralizedRCNNTransform):
    """Normalise uint8 images, resize them in evaluation (in training the data does) and pad to multiples of 32 pixels.

    Boxes are scaled back to the pixels of the original; masks stay [n, 28, 28] over their boxes.
    """

    def __init__(self, config: DetectionConfig) -> None:
        super().__init__(0, 0, list(config.mean), list(config.std), size_divisible=32)
        self.config = config

    def normalize(self, image: Tensor) -> Tensor:
        return super().normalize(image.float() / 255)

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        if self.training:
            return image, target
        size = self.config.resized(*image.shape[-2:])
        # with antialiasing, as for training images; torchvision resizes without
        resized = F.interpolate(image[None], size, mode="bilinear", align_corners=False, antialias=True)
        return resized[0], target

    def postprocess(
        self,
        result: list[dict[str, Tensor]],
        image_shapes: list[tuple[int, int]],
        original_image_sizes: list[tuple[int, int]],
    ) -> list[dict[str, Tensor]]:
        for found, shape, original in zip(result, image_shapes, original_image_sizes, strict=False):
            found["boxes"] = resize_boxes(found["boxes"], list(shape), list(original))
        return result


def _box_losses(
    scores: Tensor, regression: Tensor, labels: list[Tensor], deltas: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy over classes, and the L1 loss of the true class's box, averaged over all samples."""
    kinds = torch.cat(labels)
    positive = torch.nonzero(kinds > 0).flatten()
    own = regression.unflatten(1, (-1, 4))[positive, kinds[positive]]
    l1 = F.l1_loss(own, torch.cat(deltas)[positive], reduction="sum") / max(1, len(kinds))
    return F.cross_entropy(scores, kinds), l1


def _mask_loss(logits: Tensor, boxes: list[Tensor], owners: list[Tensor], kinds: Tensor, masks: list[Tensor]) -> Tensor:
    """Return the binary cross-entropy of the true class's mask with the object's mask, cropped to the box."""
    if not len(kinds):
        return logits.sum() * 0
    size = logits.shape[-1]
    targets = []
    for some_boxes, some_owners, some_masks in zip(boxes, owners, masks, strict=True):
        if len(some_boxes):
            rois = torch.cat((some_owners[:, None].to(some_boxes), some_boxes), 1)
            cut = roi_align(some_masks[:, None].float(), rois, (size, size), 1.0, sampling_ratio=0, aligned=True)
            targets.append((cut[:, 0] >= 0.5).float())
    chosen = logits[torch.arange(len(kinds), device=kinds.device), kinds]
    return F.binary_cross_entropy_with_logits(chosen, torch.cat(targets))
