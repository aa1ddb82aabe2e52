# SPDX-License-Identifier: Apache-2.0
"""Names in pictures whose characters matplotlib's and Pillow's own fonts lack."""

import warnings

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager
from PIL import Image

from sola_vision import fonts
from sola_vision.analysis.figures import draw_scaling
from sola_vision.analysis.scaling import Point
from sola_vision.tasks.box_pictures import Shape, draw_shapes
from sola_vision.tasks.label_pictures import draw_overlay
from sola_vision.tasks.pictures import draw_confusion

CAT, DOG, EMU = "猫犬鴯"


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch):
    monkeypatch.setattr(fonts, "_said", [])
    # the fonts of this machine may have the characters, those of matplotlib do not
    own = [font for font in fontManager.ttflist if "mpl-data" in font.fname]
    monkeypatch.setattr(fontManager, "ttflist", own)
    fonts._font.cache_clear()
    yield
    fonts._font.cache_clear()


@pytest.fixture
def _installed(tmp_path):
    """An installed font that has two of the three characters, digits and little else, all of them squares."""
    pen = TTGlyphPen(None)
    for step, corner in enumerate([(50, 0), (50, 800), (850, 800), (850, 0)]):
        (pen.lineTo if step else pen.moveTo)(corner)
    pen.closePath()
    square = pen.glyph()
    characters = {ord(letter): f"g{ord(letter)}" for letter in CAT + DOG + " 0123456789.%"}
    names = [".notdef", *characters.values()]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap(characters)
    builder.setupGlyf(dict.fromkeys(names, square) | {".notdef": TTGlyphPen(None).glyph()})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (900, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Animals", "styleName": "Regular"})
    builder.setupOS2(usWeightClass=400)
    builder.setupPost()
    builder.save(tmp_path / "animals.ttf")
    fontManager.addfont(tmp_path / "animals.ttf")


def _confusion(folder, names):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_confusion(torch.eye(len(names)), names, folder / "c.png")
    return Image.open(folder / "c.png").tobytes()


@pytest.mark.usefixtures("_installed")
def test_an_installed_font_draws_what_others_lack(tmp_path, caplog):
    cat, dog, box = (_confusion(tmp_path, [name, "b"]) for name in (CAT, DOG, EMU))
    assert cat == dog != box
    assert fonts._font(f"{CAT} b").name == "Animals"
    image, classes = Image.new("RGB", (8, 8)), np.zeros((8, 8), int)
    cat, dog, box = (draw_overlay(image, classes, [name]) for name in (CAT, DOG, EMU))
    assert cat.tobytes() == dog.tobytes() != box.tobytes()
    pictures = []
    for name in (CAT, DOG, EMU):  # a run's folder names its network
        draw_scaling([Point(name, 64, 1.0)], tmp_path / "s.png")
        pictures.append((tmp_path / "s.png").read_bytes())
    cat, dog, box = pictures
    assert cat == dog != box
    shape = Shape((0.0, 0.0, 8.0, 8.0), 0, 0.5)
    cat, dog, box = (draw_shapes(image, [shape], [name]) for name in (CAT, DOG, EMU))
    assert cat.tobytes() == dog.tobytes() != box.tobytes()
    (message,) = caplog.messages
    assert message.startswith(f"no installed font has {EMU}: ")


def test_missing_characters_are_said_in_one_line(tmp_path, caplog):
    for names in ([CAT, DOG], [DOG, EMU]):
        _confusion(tmp_path, names)
    (message,) = caplog.messages
    assert message.startswith(f"no installed font has {DOG}{CAT}: pictures show boxes instead; install ")


def test_ascii_is_drawn_as_before():
    assert fonts._font("ant bee").name == "DejaVu Sans"
    assert fonts.pillow_font("ant 98 %", 12).getname()[0] == "Aileron"
    assert fonts.pillow_font("caf\N{LATIN SMALL LETTER E WITH ACUTE}", 12).getname()[0] == "DejaVu Sans"
