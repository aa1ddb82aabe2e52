# SPDX-License-Identifier: Apache-2.0
"""The digits: the properties of the splits, and the files written for `sola predict`."""

import sys

import numpy as np
import pytest

from sola_vision.data import Digits, ImageFolder
from sola_vision.data.digits import write_folder

pytest.importorskip("sklearn")


def test_digits_split_is_a_disjoint_stratified_fifth():
    train, val = Digits("train"), Digits("val")
    assert (len(train), len(val)) == (1438, 359)
    assert not set(train.samples) & set(val.samples)
    assert len(set(train.samples) | set(val.samples)) == 1797
    per_class = np.bincount(train.targets) + np.bincount(val.targets)
    assert np.abs(np.bincount(val.targets) / per_class - 0.2).max() < 0.004
    assert val.samples == Digits("val").samples


def test_digits_are_scikit_learns_pixels_scaled_to_bytes():
    from sklearn.datasets import load_digits

    data = Digits("train")
    assert data.classes == list("0123456789")
    for index in (0, 700, 1437):
        image, label = data[index]
        number = int(data.samples[index].split("/")[1].removesuffix(".png"))
        assert image.mode == "RGB"
        assert image.size == (8, 8)
        assert label == load_digits().target[number]
        assert np.abs(np.asarray(image)[..., 0] / 255 * 16 - load_digits().images[number]).max() < 0.04
    assert max(np.asarray(data[i][0]).max() for i in range(20)) == 255


def test_digits_transform_is_applied():
    assert Digits("val", lambda image: image.size)[3][0] == (8, 8)


def test_digits_take_the_labels_of_given_classes_and_refuse_others():
    backwards = list("9876543210")
    assert [9 - t for t in Digits("val", classes=backwards).targets] == Digits("val").targets
    with pytest.raises(ValueError, match="class '0' is not among the 2 known classes"):
        Digits("val", classes=["cat", "dog"])
    with pytest.raises(ValueError, match="'test'"):
        Digits("test")


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r'^the digits come with scikit-learn: pip install "sola-vision\[demo\]"$'):
        Digits("val")


def test_write_folder_gives_held_out_digits_in_the_folder_layout(tmp_path):
    files = write_folder(tmp_path, 12)
    assert len(files) == len(set(files)) == 12
    written, digits = ImageFolder(tmp_path, "val"), Digits("val")
    assert written.classes == list("0123456789")
    for name, (image, label) in zip(written.samples, written, strict=True):
        index = digits.samples.index(name)
        assert digits.targets[index] == label
        assert digits.image(index).tobytes() == image.tobytes()
    with pytest.raises(ValueError, match="count=360"):
        write_folder(tmp_path, 360)
