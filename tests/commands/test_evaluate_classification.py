# SPDX-License-Identifier: Apache-2.0
"""The output of an evaluation with unreadable images, and its predictions for the others."""

import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from sola_vision.commands import evaluate_classification as module
from sola_vision.data import read_image


@pytest.fixture
def drawn(monkeypatch):
    """The pictures of predictions.png, as (picture, true class, predicted class, confidence)."""
    examples = []
    draw = module.draw_predictions

    def keep(shown, *more):
        examples.extend(shown)
        draw(shown, *more)

    monkeypatch.setattr(module, "draw_predictions", keep)
    return examples


@pytest.mark.parametrize("workers", [0, 1])
def test_examples_are_of_the_images_that_could_be_read(sola, tmp_path, data, trained, drawn, workers):
    shutil.copytree(data, "images")
    (tmp_path / "images" / "val" / "bee" / "0.png").write_text("no image")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.png").write_text("of other data")
    words = ["eval", "--checkpoint", trained, "--data", "images", "--out", "out", "--batch-size", 3]
    said = sola(*words, "--workers", workers)
    assert said.code == 0
    Image.open(tmp_path / "out" / "predictions.png").verify()
    assert said.out.endswith("eval.json, classes.csv, confusion.png and predictions.png of val are in out\n")
    assert said.err.splitlines()[-1] == "1 image could not be read and was skipped"
    # every picture is drawn with its own true and predicted class
    files = [file for file in sorted(Path("images/val").glob("*/*.png")) if file.parent.name + file.name != "bee0.png"]
    found = {}
    for file in files:
        (one,) = [e for e in drawn if e[0].tobytes() == read_image(file).tobytes()]
        assert one[1] == file.parent.name
        found[file] = one[2]
    assert len(drawn) == len(files) == 15
    (tmp_path / "images" / "val" / "bee" / "0.png").unlink()
    drawn.clear()
    assert sola(*words, "--workers", 0).code == 0
    again = {e[0].tobytes(): e[2] for e in drawn}
    assert found == {file: again[read_image(file).tobytes()] for file in files}


def test_examples_of_correct_predictions_are_of_all_classes(tmp_path, drawn):
    """Images come in the order of their classes: the first ones would be of the first classes only."""
    classes = ["airplane", "bonsai", "leopard", "motorbike"]
    targets = [0] * 5 + [1] * 5 + [2] * 7 + [3] * 7 + [0] * 8
    dataset = SimpleNamespace(targets=targets, image=lambda i: Image.new("RGB", (8, 8), (i, i, i)))
    best = {i: (target, 0.5) if i < 24 else (3, 0.9) for i, target in enumerate(targets)}
    module._draw_examples(dataset, classes, best, 75.0, tmp_path / "predictions.png")
    right = [true for _, true, predicted, _ in drawn if true == predicted]
    assert Counter(right) == {"airplane": 4, "bonsai": 3, "leopard": 5, "motorbike": 4}
    assert len(drawn) == 24


def test_too_many_unreadable_images_are_to_be_repaired(sola, tmp_path, data, trained):
    shutil.copytree(data, "images")
    for name in ("bee", "cat"):
        (tmp_path / "images" / "val" / name / "0.png").write_text("no image")
    said = sola("eval", "--checkpoint", trained, "--data", "images", "--out", "out", "--workers", 0)
    assert said.code == 2
    last = said.err.splitlines()[-1]
    assert "2 of the 16 evaluation images cannot be read, more than the 1 that may be skipped" in last
    # eval has no option for it
    assert "only train.max_corrupt changes this): repair or remove them; the first: " in last


def test_the_split_is_said(sola, data, trained):
    said = sola("eval", "--checkpoint", trained, "--data", data, "--split", "train", "--out", "out", "--workers", 0)
    assert said.out.endswith("predictions.png of train are in out\n")
    assert "will be replaced" not in said.err
    said = sola("eval", "--checkpoint", trained, "--data", data, "--out", "out", "--workers", 0)
    assert f"in out will be replaced: --checkpoint {trained} --data {data} --split train;" in said.err


def test_several_images_are_plural(capsys):
    from sola_vision.commands.arguments import print_skipped, print_skipped_count

    for number in range(3):
        print_skipped_count(number)
    for count in range(1, 4):
        with pytest.raises(ValueError, match=["^a$", r"^a \(and 1 other image\)$", "and 2 other images"][count - 1]):
            print_skipped([], ["a"] * count)
    says = "1 image could not be read and was skipped\n2 images could not be read and were skipped\n"
    assert capsys.readouterr().err == says
