# SPDX-License-Identifier: Apache-2.0
"""Reading of any image file as upright 8-bit RGB.

Greyscale, 1-bit, palette, CMYK, 16-bit, transparent and EXIF-rotated files are all converted as an image viewer shows
them. A file that cannot be decoded raises CorruptImage, whose message names the file, so a data loader can skip it.
"""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

# file types used in datasets; others are refused, because Pillow passes EPS to Ghostscript and datasets are untrusted
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"),
)

_ORIENTATION = 0x0112  # EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class CorruptImage(ValueError):  # noqa: N818 - clearer in an except clause
    """Raised for a file that cannot be read as an image; the message is one line and names the file."""


def check_normalisation(mean: Sequence[float], std: Sequence[float]) -> None:
    """Raise ValueError for values that pixels cannot be normalised with."""
    if not all(math.isfinite(value) for value in mean):
        raise ValueError(f"mean={tuple(mean)} must be finite")
    if not all(0 < value < math.inf for value in std):
        raise ValueError(f"std={tuple(std)} must be above 0 and finite")


def read_image(source: Path | str | BinaryIO, *, name: str | None = None) -> Image.Image:
    """Return the image as upright RGB. `name` is its name in errors, for streams that are not files."""
    if isinstance(source, Path | str):
        with open(source, "rb") as stream:
            return _decode(stream, name or str(source))
    return _decode(source, name or str(getattr(source, "name", "image in memory")))


def _decode(stream: BinaryIO, name: str) -> Image.Image:
    try:
        # only the header is read here; Pillow detects decompression bombs from it, before any pixel is allocated
        image = Image.open(stream, formats=_formats())
        image.load()
        # after load, because Pillow rotates a TIFF upright there and drops the tag
        orientation = _orientation(image)
        rgb = _to_rgb(image)
        if orientation in _UPRIGHT:
            rgb = rgb.transpose(_UPRIGHT[orientation])
    except Image.DecompressionBombError as error:
        fix = "make it smaller, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust it"
        raise CorruptImage(_line(f"{name}: {error}; {fix}")) from None
    except UnidentifiedImageError:
        known = f"not an image of a known type ({', '.join(FORMATS)})"
        raise CorruptImage(_line(f"{name}: {'the file is empty' if _is_empty(stream) else known}")) from None
    except MemoryError:
        raise
    # any other exception: Pillow's decoders raise many types on malformed bytes
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk failed, not the image
        reason = str(error) or type(error).__name__
        raise CorruptImage(_line(f"{name}: cannot be read as an image: {reason}")) from error
    # otherwise a caller that applies the EXIF orientation would rotate the image a second time
    rgb.info = {}
    return rgb


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(form for form in FORMATS if form in Image.OPEN)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    # with broken metadata only the orientation is lost; Pillow's EXIF parser raises many types
    except Exception:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise CorruptImage("floating-point pixels have no agreed range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = _to_eight_bits(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        # on white: transparent images are designed for a page, and black would hide dark drawings;
        # dropping alpha would show arbitrary hidden colours
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # CMYK: Pillow undoes Adobe's inversion when it decodes a JPEG, so one conversion serves JPEG and TIFF
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 0..65535 to 0..255; Pillow's convert clips at 255 and turns most of the image white."""
    pixels = np.asarray(image).astype(np.int64)
    if pixels.min() < 0 or pixels.max() > 65535:
        raise CorruptImage("32-bit pixels outside 0..65535 have no agreed range; save it with 8 or 16 bits")
    grey = Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # one of 65536 levels, not distinguishable after scaling to 256
        grey.putalpha(Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8)))
    return grey


def _is_empty(stream: BinaryIO) -> bool:
    stream.seek(0)
    return not stream.read(1)


def _line(text: str) -> str:
    return " ".join(text.split())
