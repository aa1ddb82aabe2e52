# SPDX-License-Identifier: Apache-2.0
"""A network with everything in it and few layers, since tracing takes a second a layer."""

import timm
import torch

import sola_vision  # noqa: F401 - registers the names


def build(**changes):
    torch.manual_seed(0)
    small = {"schedule": "L/LS", "dims": (8, 32), "bridges": "1.1>2.2", "num_classes": 5, "img_size": 64}
    return timm.create_model("sola_nano", **{**small, **changes}).eval()
