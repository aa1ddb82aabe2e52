# SPDX-License-Identifier: Apache-2.0
"""`sola explain` from the outside: its files, orientation, comparison, and one line for wrong input."""

import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from sola_vision.cli import main
from sola_vision.data import ImageConfig
from sola_vision.engine import save_weights
from sola_vision.tasks import ModelConfig, build_model, metadata


@pytest.fixture
def photograph(tmp_path):
    """Wider than high, left half dark; the file holds it on its side, with the EXIF tag that says so."""
    pixels = np.zeros((40, 64, 3), np.uint8)
    pixels[:, 32:] = 220
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    Image.fromarray(np.rot90(pixels).copy()).save(tmp_path / "photo.png", exif=exif)
    return str(tmp_path / "photo.png")


def test_files_of_one_network(photograph, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [photograph, "--model", "sola_nano", "--bridges", "paper", "--point", "50,10", "--out", str(out)]
    assert main(["explain", *arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["height"], result["width"]) == (40, 64)
    assert {"commit", "command", "torch", "checkpoint"} <= result.keys()
    assert len(result["networks"][0]["layers"]) == 12
    saved = np.load(out / "maps.npz")
    assert saved["image"].shape == (40, 64, 3)
    # upright: the left half is the dark one
    assert saved["image"][:, :30].mean() < 10 < 200 < saved["image"][:, 34:].mean()
    assert saved["1.1 L/wkv"].shape == (10, 16)
    assert saved["1.1 L/token"].tolist() == [2, 12]
    sheet = Image.open(out / "sheet.png")
    assert sheet.size[0] > 1000
    page = (out / "page.html").read_text()
    # one file, nothing to load
    assert not re.search(r"(src|href)\s*=\s*[\"']?https?:", page)
    assert "http" not in page.replace("http-equiv", "")
    data = json.loads(page.split('type="application/json">')[1].split("</script>")[0].replace("<\\/", "</"))
    assert [layer["name"] for layer in data["networks"][0]["layers"]][:2] == ["1.1 L", "1.2 L"]
    assert data["steps"] == 12
    assert (out / "layers.csv").read_text().count("\n") == 13


def test_names_with_markup_stay_text(tmp_path):
    file = tmp_path / "<b>&.png"
    Image.new("RGB", (32, 32)).save(file)
    arguments = ["--model", "sola_nano", "--schedule", "L/L/L/L", "--out", str(tmp_path / "out")]
    assert main(["explain", str(file), *arguments]) == 0
    assert "<b>" not in (tmp_path / "out" / "page.html").read_text()


@pytest.fixture
def checkpoint(tmp_path):
    config = ModelConfig(name="sola_nano", dims=(8, 16, 32, 32))
    model = build_model(config, 2, 32)
    path = tmp_path / "run" / "best.safetensors"
    path.parent.mkdir()
    save_weights(path, model, metadata("classification", config, ImageConfig(size=32), ["a", "b"], model))
    return str(path)


def test_trained_against_random_on_the_multiscale_scene_with_fields(checkpoint, photograph, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["multiscale", "--size", "64", "--checkpoint", checkpoint, "--compare", "random"]
    fields = ["--field", photograph, "--field-size", "32", "--no-page"]
    assert main(["explain", *arguments, *fields, "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [n["network"] for n in result["networks"]] == ["sola_nano (run)", "random weights"]
    layer = result["networks"][0]["layers"][0]
    assert len(layer["activation_on_objects"]) == len(layer["eigencam_over_chance"]) == 5
    assert len(result["receptive_fields"]) == 4
    assert (out / "fields.png").exists()
    assert not (out / "page.html").exists()
    assert "sola_nano (run)/1.1 L/wkv" in np.load(out / "maps.npz").files


def test_the_table_names_a_run_whose_name_looks_like_markup(checkpoint, photograph, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").rename("[bold]")
    assert main(["explain", photograph, "--checkpoint", "[bold]", "--size", "32", "--no-page", "--out", "out"]) == 0
    assert "sola_nano ([bold])\n" in capsys.readouterr().out


def test_two_schedules_side_by_side(photograph, tmp_path):
    arguments = ["--model", "sola_nano", "--compare", "LL/LL/LLLLLL/LL", "--no-page", "--out", str(tmp_path / "out")]
    assert main(["explain", photograph, *arguments]) == 0
    names = np.load(tmp_path / "out" / "maps.npz").files
    assert any("LLLLLL" in name and "3.3 L/wkv" in name for name in names)


def test_peers_are_explained_by_their_maps(photograph, tmp_path):
    out = tmp_path / "out"
    assert main(["explain", photograph, "--model", "convnext_atto", "--size", "64x64", "--out", str(out)]) == 0
    assert "map 4/eigencam" in np.load(out / "maps.npz").files


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing.png"], "nothing.png: no such image; give an image file"),
        (["PHOTO", "--point", "64,0"], "the image has 64 x 40 pixels"),
        (["PHOTO", "--point", "middle"], "must be X,Y in pixels"),
        (["PHOTO", "--size", "big"], "must be HEIGHTxWIDTH"),
        (["PHOTO", "--model", "sola_huge"], "'sola_huge' is unknown"),
        (["PHOTO", "--compare", "random"], "needs a checkpoint"),
        (["PHOTO", "--compare", "LL"], "has 1 stage but dims"),
        (["PHOTO", "--checkpoint", "nowhere"], "nowhere"),
        (["PHOTO", "--checkpoint", "x", "--schedule", "L"], "leave out --model"),
        (["multiscale", "--size", "32x64"], "square"),
        (["PHOTO", "--model", "vit_tiny_patch16_224"], "takes only 224x224: give --size 224x224"),
        (
            ["PHOTO", "--model", "vit_tiny_patch16_224", "--size", "224x224", "--field", "PHOTO", "--field-size", "64"],
            "--field-size 64",
        ),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, says, photograph, tmp_path, capsys):
    given = [photograph if a == "PHOTO" else a for a in arguments]
    extra = [] if any(a in given for a in ("--model", "--checkpoint")) else ["--model", "sola_nano"]
    assert main(["explain", *given, *extra, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_the_point_is_one_of_the_image_as_given(photograph, tmp_path):
    words = ["--model", "sola_nano", "--schedule", "L/L/L/L", "--no-page", "--out", str(tmp_path / "out")]
    assert main(["explain", photograph, "--size", "128", "--point", "50,10", *words]) == 0
    result = json.loads((tmp_path / "out" / "explain.json").read_text())
    assert (result["height"], result["width"]) == (80, 128)
    assert result["point"] == {"x": 100, "y": 20}
    assert np.load(tmp_path / "out" / "maps.npz")["1.1 L/token"].tolist() == [5, 25]
    # nearer the edge than a smaller size has pixels
    assert main(["explain", photograph, "--size", "16x32", "--point", "63,39", *words]) == 0
    saved = np.load(tmp_path / "out" / "maps.npz")
    assert saved["point"].tolist() == [39 * 16 / 40, 63 * 32 / 64]
    assert saved["1.1 L/patch"].tolist() == [4, 4]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], ["image", "sola explain --help"]),
        (["PHOTO", "--sizes", "32"], ["--sizes", "sola explain --help"]),
        (["PHOTO", "--check", "x"], ["--check", "sola explain --help"]),  # no abbreviations
        (["PHOTO", "--field-size", "many"], ["--field-size", "'many'"]),
        (["EMPTY"], ["empty is a folder", "give one image file"]),
        (["PHOTO", "--out", "PHOTO"], ["--out", "photo.png", "a file", "another path"]),
        (["PHOTO", "--out", "PHOTO/below"], ["--out", "photo.png/below", "a file", "another path"]),
        (["PHOTO", "--field", "EMPTY"], ["--field", "empty contains no images"]),
        (["PHOTO", "--field", "nowhere"], ["--field nowhere", "no such image or folder"]),
        (["PHOTO", "--field", "BROKEN"], ["broken.png", "empty"]),
        (
            ["PHOTO", "--size", "16", "--point", "64,0"],
            ["--point 64,0", "64 x 40 pixels", "0 to 63", "0 at the top to 39"],
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(refused, monkeypatch, photograph, tmp_path, words, names):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken.png").touch()
    places = {"PHOTO": photograph, "EMPTY": str(tmp_path / "empty"), "BROKEN": str(tmp_path / "broken.png")}
    given = [next((w.replace(n, p) for n, p in places.items() if n in w), w) for w in words]
    monkeypatch.setattr("sola_vision.commands.explain.explain", lambda *a, **k: pytest.fail("was explained"))
    refused("explain", *given, "--model", "sola_nano", names=names)


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
def test_a_name_that_is_not_utf8_is_shown_with_replaced_characters(tmp_path):
    file = tmp_path / "\udce9.png"
    Image.new("RGB", (32, 32)).save(file)
    arguments = ["--model", "sola_nano", "--schedule", "L/L/L/L", "--out", str(tmp_path / "out")]
    assert main(["explain", str(file), *arguments]) == 0
    assert (tmp_path / "out" / "sheet.png").is_file()
    assert "?.png" in (tmp_path / "out" / "page.html").read_text(encoding="utf-8")
