# SPDX-License-Identifier: Apache-2.0
"""What modules that replace a layer or a mixer have to return."""

from typing import Any

from torch import Tensor, nn

LAYER_RESULTS = "the layer's map [B, H, W, C] and its state for bridges, or None"
MIXER_RESULTS = "the mixer's output and its read-out, which bridges carry, both [B, H, W, C]"


def two_results(returned: Any, part: nn.Module, expected: str) -> tuple[Tensor, Any]:
    """What a mixer or a layer returned. Raise TypeError for one tensor, as a replacement may return it: two images
    would unpack into one image each.
    """
    if isinstance(returned, Tensor):
        raise TypeError(f"{type(part).__name__} returned one tensor: return two values, {expected}")
    return returned
