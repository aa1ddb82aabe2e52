# SPDX-License-Identifier: Apache-2.0
"""Data for training and evaluation: images of every kind, folders and tar files, the digits, generated scenes."""

from .digits import Digits
from .folder import ImageFolder
from .images import SUFFIXES, CorruptImage, read_image
from .open import open_classification
from .presets import EvalTransform, ImageConfig, TrainTransform
from .scenes import Scene, Scenes

__all__ = [
    "SUFFIXES",
    "CorruptImage",
    "Digits",
    "EvalTransform",
    "ImageConfig",
    "ImageFolder",
    "Scene",
    "Scenes",
    "TrainTransform",
    "open_classification",
    "read_image",
]
