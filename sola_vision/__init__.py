# SPDX-License-Identifier: Apache-2.0
"""SoLA-Vision: a vision backbone of linear (Bi-WKV) and softmax attention layers, chosen by one string.

Importing it registers `sola_nano`, `sola_tiny`, `sola_small` and `sola_base` with timm.
"""

from sola_vision import ops, sola
from sola_vision.backbone import SolaVision
from sola_vision.config import SolaConfig, base, nano, small, tiny
from sola_vision.ops import wkv
from sola_vision.schedule import parse_bridges, parse_schedule
from sola_vision.version import __version__

__all__ = [
    "SolaConfig",
    "SolaVision",
    "__version__",
    "base",
    "nano",
    "ops",
    "parse_bridges",
    "parse_schedule",
    "small",
    "sola",
    "tiny",
    "wkv",
]
