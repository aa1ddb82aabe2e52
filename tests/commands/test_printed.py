# SPDX-License-Identifier: Apache-2.0
"""The numbers and tables that commands print: units, and names that are not cut."""

import io
import re

import pytest
from PIL import Image
from small import CLASSES, TINY, write_images

from sola_vision.cli import main
from sola_vision.commands import evaluate_segmentation


@pytest.mark.parametrize(("count", "top5"), [(5, False), (6, True)])
def test_percentages_have_their_unit_and_top5_is_of_more_than_five_classes(sola, tmp_path, count, top5):
    data = write_images(tmp_path / "images", [f"class{i}" for i in range(count)], train=3, val=(1,))
    said = sola(*TINY, "--data", data, "--out", "run")
    assert said.code == 0, said.err
    number = r"[\d.]+(e[+-]\d+)?"
    more = rf"top5 {number} %" if top5 else ""
    assert re.search(rf"^epoch {number}  top1 {number} %  {more and more + '  '}loss {number}$", said.err, re.MULTILINE)
    assert re.match(rf"top1 {number} %, {more and more + ', '}loss {number}; best.safetensors", said.out)
    said = sola("eval", "--checkpoint", "run", "--data", data, "--workers", 0)
    assert re.search(rf"^top-1 {number} %, {'top-5 ' + number + ' %, ' if top5 else ''}loss ", said.out, re.MULTILINE)


def test_names_are_not_broken_where_the_output_is_no_terminal(sola, tmp_path, data, trained):
    name = "a very long name of a file, with spaces, " * 3 + "0.png"
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / name).write_bytes((data / "val" / "ant" / "0.png").read_bytes())
    said = sola("predict", "pictures", "--checkpoint", trained, "--top", 99)
    assert said.code == 0, said.err
    (row,) = [line for line in said.out.splitlines() if name in line]
    assert all(f" {each} " in row for each in CLASSES)
    (tmp_path / ("long " * 30)).symlink_to(data)
    said = sola("eval", "--checkpoint", trained, "--data", "long " * 30, "--workers", 0, "--out", "out")
    assert said.code == 0, said.err
    assert f"on {'long ' * 30} (val, 16 images)\n" in said.out


@pytest.mark.parametrize(("number", "says"), [(1, "1 image, "), (2, "2 images, ")])
def test_title_of_a_segmentation_counts_images_and_classes(capsys, number, says):
    row = {"class": "sky", "pixels": 9, "iou": 50.0, "accuracy": 60.0, "precision": 70.0}
    numbers = {"miou": 50.0, "miou_all": 25.0, "mean_accuracy": 60.0, "pixel_accuracy": 60.0}
    rows = [row, {**dict.fromkeys(row, None), "class": "sea", "pixels": 0}]
    result = {"predictions": "p", "annotations": "a", "images": number, "rule": "labels 0..1", "classes": rows}
    evaluate_segmentation._print({**result, **numbers})
    out = capsys.readouterr().out
    assert f"p on a: {says}labels 0..1" in out
    assert "mIoU 50.00 % over the 1 class that occurs, 25.00 % over all 2 " in out


def test_a_name_that_the_output_cannot_show_is_escaped(tmp_path, trained, monkeypatch):
    """The output of a command in a pipe on Windows has the encoding of the region."""
    Image.new("RGB", (32, 32)).save(tmp_path / "caf\N{LATIN SMALL LETTER E WITH ACUTE}.png")
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="cp1251"))
    assert main(["predict", str(tmp_path), "--checkpoint", str(trained)]) == 0
    assert b"caf\\xe9.png" in written.getvalue()
