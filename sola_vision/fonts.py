# SPDX-License-Identifier: Apache-2.0
"""Fonts for names in pictures: installed ones where those of matplotlib and Pillow lack characters."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, fontManager, get_font
from matplotlib.text import Text
from PIL import ImageFont

_log = logging.getLogger("sola_vision")
_OWN = "DejaVu Sans"  # comes with matplotlib
_said: list[str] = []  # the first text with characters that no font has


def save_figure(figure: Figure, out: Path, dpi: int) -> None:
    """Write a figure whose texts may have characters of any language."""
    with fonts_for(figure):
        figure.savefig(out, dpi=dpi)


@contextmanager
def fonts_for(figure: Figure) -> Iterator[None]:
    """Choose fonts for the texts of a figure, which may have characters of any language, to draw it in this context."""
    texts: list[Text] = figure.findobj(Text)
    for text in texts:  # names of files may have bytes that are not UTF-8, which matplotlib refuses
        text.set_text(text.get_text().encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
    font = _font("".join(sorted(set().union(*(text.get_text() for text in texts)))))
    for text in texts:
        text.set_fontfamily([*rcParams["font.family"], font.name])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # said once, by _font
        yield


def pillow_font(text: str, size: float) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    """Return a font that has the characters of the text; Pillow's own has little more than ASCII."""
    return ImageFont.load_default(size) if text.isascii() else ImageFont.truetype(_font(text).fname, size)


@cache
def _font(text: str) -> FontEntry:
    """Return matplotlib's own font, or the installed one that has most of the characters that it lacks."""
    fonts = [font for font in fontManager.ttflist if not font.name.startswith("Last Resort")]  # it has boxes only
    fonts.sort(key=lambda font: (font.name != _OWN, font.style != "normal", font.weight != 400))
    wanted = {ord(letter) for letter in text if letter.isprintable()}
    lacking = wanted - _characters(fonts[0].fname)
    if not lacking:
        return fonts[0]
    best = max(fonts, key=lambda font: [len(some & _characters(font.fname)) for some in (lacking, wanted)])
    if (rest := sorted(lacking - _characters(best.fname))) and not _said:
        _said.append(text)
        some = "".join(map(chr, rest[:5]))
        _log.warning("no installed font has %s: pictures show boxes instead; install Noto Sans CJK, for example", some)
    return best


@cache
def _characters(path: str) -> frozenset[int]:
    try:
        font = get_font(path)
    except (OSError, RuntimeError):  # removed since the list was made, or damaged
        return frozenset()
    return frozenset(font.get_charmap() if font.scalable else ())
