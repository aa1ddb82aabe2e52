# SPDX-License-Identifier: Apache-2.0
"""The parts of the network. Every layer takes and returns [B, H, W, C]."""

from sola_vision.layers.bridge import HiddenStateBridge
from sola_vision.layers.linear import ChannelMix, LinearLayer, LinearMixer
from sola_vision.layers.norm import LayerNorm
from sola_vision.layers.patches import PatchMerging, PositionEmbedding, Stem, resize_position
from sola_vision.layers.softmax import ConvMlp, SoftmaxLayer, SoftmaxMixer

__all__ = [
    "ChannelMix",
    "ConvMlp",
    "HiddenStateBridge",
    "LayerNorm",
    "LinearLayer",
    "LinearMixer",
    "PatchMerging",
    "PositionEmbedding",
    "SoftmaxLayer",
    "SoftmaxMixer",
    "Stem",
    "resize_position",
]
