# SPDX-License-Identifier: Apache-2.0
"""COCO's masks: polygons and run lengths, converted by the library that also scores them, and checks of its input.

Run lengths follow the columns and alternate between 0 and 1, starting with 0. Compressed, each is stored as its
difference to the one two positions before, in groups of five bits with a sixth as continuation bit.
"""

from types import ModuleType
from typing import Any

import numpy as np


def mask_library() -> ModuleType:
    """Return COCO's mask API; ImportError with the package to install if it is missing."""
    try:
        from faster_coco_eval.core import mask
    except ImportError:
        raise ImportError('COCO\'s masks and scores need faster-coco-eval: pip install "sola-vision[det]"') from None
    return mask


def run_lengths(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Return polygons or run lengths, compressed or not, as compressed run lengths."""
    library = mask_library()
    if isinstance(segmentation, list):
        return library.merge(library.frPyObjects(segmentation, *size))
    return library.frPyObjects(segmentation, *size) if isinstance(segmentation["counts"], list) else segmentation


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Return a mask, uint8 [H, W] of 0 and 1, as compressed run lengths that can be stored as JSON."""
    packed = mask_library().encode(np.asfortranarray(mask))
    counts = packed["counts"]
    text = counts.decode() if isinstance(counts, bytes) else str(counts)
    return {"size": [int(side) for side in mask.shape], "counts": text}


def unusable_mask(segmentation: Any, size: tuple[int, int]) -> str | None:
    """Return why this cannot be the mask of an image of `size` (H, W); None if it can, or if it is empty.

    The library hangs or crashes the process on lengths that do not add up and points that are not numbers.
    """
    if not segmentation:
        return None  # objects may have only a box
    if isinstance(segmentation, dict):
        counts = segmentation.get("counts")
        if not isinstance(counts, str | list):
            return "with run lengths that are not a string or a list"
        sides = segmentation.get("size")
        if sides not in (list(size), size):
            return "with a mask of another size than the image"
        if not all(type(side) is int for side in sides):  # the library does not accept 80.0 for 80
            return "with a mask whose size is not two integers"
        return None if _add_up(counts, size[0] * size[1]) else "with run lengths that do not add up to the image"
    for polygon in segmentation if isinstance(segmentation, list) else [None]:
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            return "with a polygon of fewer than three points"
        if not all(isinstance(v, int | float) and abs(v) <= 2 * max(size) for v in polygon):
            return "with a polygon far outside the image"
    return None


def _add_up(counts: str | list[Any], pixels: int) -> bool:
    if isinstance(counts, str):
        values = _unpack(counts)
        return values is not None and bool((values >= 0).all()) and int(values.sum()) == pixels
    return all(isinstance(count, int) and count >= 0 for count in counts) and sum(counts) == pixels


def _unpack(counts: str) -> np.ndarray | None:
    """Return compressed run lengths as numbers; None if they are malformed."""
    codes = np.frombuffer(counts.encode("utf-8", "replace"), np.uint8).astype(np.int64) - 48
    if not codes.size or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return None
    last = np.flatnonzero((codes & 32) == 0)
    first = np.concatenate(([0], last[:-1] + 1))
    place = np.arange(len(codes)) - np.repeat(first, last - first + 1)
    if place.max() > 6:  # more than 35 bits, which no image needs
        return None
    values = np.add.reduceat((codes & 31) << (5 * place), first)
    values -= np.where(codes[last] & 16, 1 << (5 * (place[last] + 1)), 0)  # the highest bit is the sign
    for start in (1, 2):  # differences from the fourth on; the first is absolute
        values[start::2] = np.cumsum(values[start::2])
    return values
