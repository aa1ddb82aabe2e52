# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of small networks with random weights, one of each task."""

from dataclasses import asdict

import torch

from sola_vision.data import DetectionConfig, ImageConfig, SegmentationConfig
from sola_vision.engine import save_weights
from sola_vision.tasks import DetectorConfig, ModelConfig, UPerNetConfig, build_model, detector, metadata, segmenter

CLASSES = ["ant", "bee", "cat"]


def save_classifier(path):
    torch.manual_seed(0)
    config, image = ModelConfig(name="sola_nano", schedule="L/S", dims=(8, 32)), ImageConfig(size=48)
    model = build_model(config, len(CLASSES), image.size)
    torch.nn.init.normal_(model.head.fc.weight)  # tells the classes apart
    return _save(path, model, metadata("classification", config, image, CLASSES, model))


def save_segmenter(path):
    torch.manual_seed(0)
    config = ModelConfig(name="sola_nano", schedule="L/L/L/S", dims=(8, 16, 16, 32))
    head, image = UPerNetConfig(channels=16, auxiliary_channels=16), SegmentationConfig()
    model = segmenter.build_segmenter(config, head, len(CLASSES), 64)
    source = segmenter.backbone_of(model)
    return _save(path, model, metadata("segmentation", config, image, CLASSES, source, segmenter=asdict(head)))


def save_detector(path):
    torch.manual_seed(0)
    config = ModelConfig(name="sola_nano", schedule="L/L/L/S", dims=(8, 16, 16, 32))
    settings, image = DetectorConfig(channels=16), DetectionConfig()
    model = detector.build_detector(config, settings, image, len(CLASSES))
    more = {"detector": asdict(settings), "category_ids": [1, 2, 3]}
    return _save(path, model, metadata("detection", config, image, CLASSES, detector.backbone_of(model), **more))


def _save(path, model, about):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_weights(path, model, about)
    return path
