# SPDX-License-Identifier: Apache-2.0
"""Tasks: the model, loss and metric of classification, detection, segmentation and distillation, for `engine.fit`."""

from sola_vision.tasks.classification import Classification, Tally
from sola_vision.tasks.detector import DetectorConfig
from sola_vision.tasks.distillation import DistillConfig
from sola_vision.tasks.model import (
    ModelConfig,
    build_model,
    describe_classifier,
    metadata,
    read_description,
    takes_one_size,
)
from sola_vision.tasks.teacher import TeacherConfig
from sola_vision.tasks.upernet import UPerNetConfig
from sola_vision.tasks.weights import Checkpoint, initialise, load, load_checkpoint, save_pretrained

__all__ = [
    "Checkpoint",
    "Classification",
    "DetectorConfig",
    "DistillConfig",
    "ModelConfig",
    "Tally",
    "TeacherConfig",
    "UPerNetConfig",
    "build_model",
    "describe_classifier",
    "initialise",
    "load",
    "load_checkpoint",
    "metadata",
    "read_description",
    "save_pretrained",
    "takes_one_size",
]
