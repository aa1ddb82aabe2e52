# SPDX-License-Identifier: Apache-2.0
"""Datasets and transforms: image files, folders and tar files, COCO, segmentation, the digits, generated scenes."""

from .coco import CocoFolder, MissingMaskError, Objects, is_finite, read_truth
from .detection_presets import (
    DetectionConfig,
    DetectionEvalTransform,
    DetectionTrainTransform,
    collate_lists,
    to_pixels,
)
from .digits import Digits
from .folder import ImageFolder
from .images import SUFFIXES, CorruptImage, read_image
from .labels import IGNORED, LabelRule, read_labels
from .memory import MemoryImages, balanced_subset, decode, fingerprint, shuffled_by_class
from .open import open_classification
from .presets import EvalTransform, ImageConfig, TrainTransform
from .run_lengths import encode_mask, mask_library, unusable_mask
from .scenes import Scene, Scenes
from .segmentation import SegmentationFolder, open_segmentation
from .segmentation_presets import SegmentationConfig, SegmentationEvalTransform, SegmentationTrainTransform

__all__ = [
    "IGNORED",
    "SUFFIXES",
    "CocoFolder",
    "CorruptImage",
    "DetectionConfig",
    "DetectionEvalTransform",
    "DetectionTrainTransform",
    "Digits",
    "EvalTransform",
    "ImageConfig",
    "ImageFolder",
    "LabelRule",
    "MemoryImages",
    "MissingMaskError",
    "Objects",
    "Scene",
    "Scenes",
    "SegmentationConfig",
    "SegmentationEvalTransform",
    "SegmentationFolder",
    "SegmentationTrainTransform",
    "TrainTransform",
    "balanced_subset",
    "collate_lists",
    "decode",
    "encode_mask",
    "fingerprint",
    "is_finite",
    "mask_library",
    "open_classification",
    "open_segmentation",
    "read_image",
    "read_labels",
    "read_truth",
    "shuffled_by_class",
    "to_pixels",
    "unusable_mask",
]
