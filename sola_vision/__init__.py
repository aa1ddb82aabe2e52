# SPDX-License-Identifier: Apache-2.0
"""SoLA-Vision: a vision backbone of linear (Bi-WKV) and softmax attention layers, chosen by one string."""

from sola_vision.ops import wkv
from sola_vision.version import __version__

__all__ = ["__version__", "wkv"]
