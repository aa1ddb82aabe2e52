# SPDX-License-Identifier: Apache-2.0
"""Networks on the page: predictions of checkpoints of every task, network names, and maps of layers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from saved import save_classifier, save_detector, save_segmenter

from sola_vision.app.subject import _draw_map, load, names
from sola_vision.cli import main


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 255, (5, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((96, 60), Image.Resampling.BICUBIC)


def test_a_classifier_says_what_predict_says(tmp_path, picture, capsys):
    path = save_classifier(tmp_path / "run" / "best.safetensors")
    picture.save(tmp_path / "p.png")
    assert main(["predict", str(tmp_path / "p.png"), "--checkpoint", str(path), "--json"]) == 0
    wanted = json.loads(capsys.readouterr().out)["images"][0]["classes"]
    subject = load(str(path.parent))
    prediction = subject.predict(picture)
    assert prediction.picture is None
    assert prediction.shares == pytest.approx({guess["class"]: guess["probability"] for guess in wanted}, rel=1e-4)


def test_every_layer_has_maps_of_the_pictures_shape(tmp_path, picture):
    subject = load(str(save_classifier(tmp_path / "best.safetensors")))
    layers = subject.layer_maps(picture, 64)
    assert [name for name, _, _ in layers] == ["1.1 L", "2.1 S"]
    for _, cam, activation in layers:
        assert cam.size == activation.size == (320, 200)
        assert np.asarray(cam).std() > 0
    # maps are of this picture: mirrored, they are others
    mirrored = subject.layer_maps(picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), 64)
    assert not np.array_equal(np.asarray(mirrored[0][1]), np.asarray(layers[0][1]))


@pytest.mark.parametrize("opacity", [0.6, 1.0])
def test_every_token_is_painted_on_its_pixels(opacity):
    """97 x 131 pixels, patches of 32: the last row of tokens covers 1 pixel, the last column 3."""
    values = torch.zeros(4, 5)
    values[1, 2] = 1
    picture = Image.new("RGB", (131, 97))
    painted = np.asarray(_draw_map(values, (32 / 97, 32 / 131), picture, opacity)).astype(int)
    assert painted.shape == (237, 320, 3)
    bright = painted[..., 1]  # viridis rises in green
    hot = (bright - bright[0, 0]).clip(0)
    centre = [float((hot.sum(1 - axis) * (np.arange(n) + 0.5)).sum() / hot.sum()) for axis, n in enumerate(hot.shape)]
    assert centre == pytest.approx([48 * 320 / 131, 80 * 320 / 131], abs=2)
    if opacity == 1:
        rows, columns = np.nonzero(hot.any(1))[0], np.nonzero(hot.any(0))[0]
        assert (rows[0], rows[-1]) == pytest.approx((32 * 320 / 131, 64 * 320 / 131 - 1), abs=1)
        assert (columns[0], columns[-1]) == pytest.approx((64 * 320 / 131, 96 * 320 / 131 - 1), abs=1)
    # a network that ignores the last pixels: the picture shows there
    unseen = np.asarray(_draw_map(values[:3, :4], (32 / 97, 32 / 131), picture, opacity)).astype(int)
    assert not unseen[:, 314:].any()
    assert unseen[:230, :310].any(-1).all()


def test_a_segmenter_colours_and_a_detector_draws(tmp_path, picture):
    segmented = load(str(save_segmenter(tmp_path / "masks.safetensors"))).predict(picture)
    assert sum(segmented.shares.values()) == pytest.approx(1)
    assert segmented.picture.width > picture.width  # with a legend
    subject = load(str(save_detector(tmp_path / "boxes.safetensors")))
    assert subject.predict(picture).picture is not None
    assert [name for name, _, _ in subject.layer_maps(picture, 64)] == ["1.1 L", "2.1 L", "3.1 L", "4.1 S"]


def test_a_name_has_maps_but_no_classes(picture):
    subject = load("sola_nano")
    assert subject.predict(picture).shares == {}
    assert "random weights" in subject.label
    assert len(subject.layer_maps(picture, 64)) == 12


def test_choices_are_what_was_asked_for_then_runs_then_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_classifier(tmp_path / "runs" / "b" / "best.safetensors")
    (tmp_path / "runs" / "unfinished").mkdir()
    assert names(["mine", "runs/b"]) == ["mine", "runs/b", "sola_nano", "sola_tiny", "sola_small", "sola_base"]
    assert names([])[0] == "runs/b"


def test_what_is_no_checkpoint_is_refused(tmp_path):
    torch.save({"weights": torch.zeros(1)}, tmp_path / "theirs.pt")
    for source in ("nowhere", str(tmp_path / "theirs.pt"), str(tmp_path)):
        with pytest.raises((ValueError, OSError)):
            load(source)
