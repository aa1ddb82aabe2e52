# SPDX-License-Identifier: Apache-2.0
"""Label rules, label files of every kind, the layout and its errors, transforms that keep image and labels aligned."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sola_vision.data import (
    IGNORED,
    CorruptImage,
    LabelRule,
    SegmentationConfig,
    SegmentationEvalTransform,
    SegmentationTrainTransform,
    open_segmentation,
    read_labels,
)
from sola_vision.data.scenes import write_segmentation

REAL = Path(os.environ.get("SOLA_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture
def root(tmp_path):
    write_segmentation(tmp_path, 3, 2, (40, 56))
    return tmp_path


def label_file(root, index=0, split="train"):
    return root / "annotations" / split / f"{index:05d}.png"


def save(array, path, mode=None):
    Image.fromarray(np.asarray(array), mode).save(path)


# labels and classes --------------------------------------------------------------------------------------------------
def test_the_rule_of_ade20k_and_the_plain_one():
    labels = np.array([[0, 1, 2, 150]], dtype=np.uint8)
    assert LabelRule(150, 0).to_classes(labels, "a").tolist() == [[IGNORED, 0, 1, 149]]
    assert LabelRule(151, 255).to_classes(labels, "a").tolist() == [[0, 1, 2, 150]]
    assert LabelRule(3, 150).to_classes(labels, "a").tolist() == [[0, 1, 2, IGNORED]]


@pytest.mark.parametrize(
    ("classes", "ignore"), [(1, 0), (150, 0), (11, 11), (21, 255), (255, 255), (300, 0), (300, 999)]
)
def test_labels_survive_a_round_trip(classes, ignore):
    rule = LabelRule(classes, ignore)
    every = np.arange(-1, classes)
    labels = rule.to_labels(every)
    assert labels.dtype == (np.uint8 if classes < 256 and ignore < 256 else np.uint16)
    assert rule.to_classes(labels, "a").tolist() == every.tolist()
    assert labels[0] == ignore


@pytest.mark.parametrize(("classes", "ignore"), [(0, 255), (11, 5), (11, -1)])
def test_rules_that_cannot_be(classes, ignore):
    with pytest.raises(ValueError, match=r"classes|ignore"):
        LabelRule(classes, ignore)


@pytest.mark.parametrize(
    ("rule", "label"), [(LabelRule(150, 0), 151), (LabelRule(11, 11), 12), (LabelRule(11, 255), 11)]
)
def test_a_label_beyond_the_classes_is_named(rule, label):
    with pytest.raises(
        ValueError, match=rf"x\.png: label {label} in 2 pixels is not valid: labels .* are classes"
    ) as info:
        rule.to_classes(np.array([[1, label, label]]), "x.png")
    assert "\n" not in str(info.value)


# label files ----------------------------------------------------------------------------------------------------------
def test_labels_are_numbers_not_colours(tmp_path):
    expected = np.arange(12, dtype=np.uint8).reshape(3, 4)
    palette = Image.fromarray(expected)
    palette.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    assert palette.mode == "P"
    palette.save(tmp_path / "palette.png")
    save(expected, tmp_path / "grey.png")
    Image.fromarray(expected.astype(np.uint16)).save(tmp_path / "deep.png")
    save(expected, tmp_path / "grey.tif")
    Image.fromarray(expected > 5).save(tmp_path / "bits.png")
    for name in ("palette.png", "grey.png", "deep.png", "grey.tif"):
        assert read_labels(tmp_path / name).tolist() == expected.tolist(), name
    assert read_labels(tmp_path / "bits.png").tolist() == (expected > 5).astype(int).tolist()
    deep = expected.astype(np.uint16) + 300
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert read_labels(tmp_path / "deep.png").tolist() == deep.tolist()


def test_what_is_no_label_file_is_named(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "colour.png")
    Image.new("L", (64, 64)).save(tmp_path / "grey.jpg")
    save(np.random.default_rng(0).integers(0, 9, (64, 64)).astype(np.uint8), tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    for name, says in (
        ("colour.png", "mode RGB, not labels"),
        ("grey.jpg", "not a label file"),
        ("half.png", "cannot be read as labels"),
        ("empty.png", "not a label file"),
    ):
        with pytest.raises(CorruptImage, match=says) as info:
            read_labels(tmp_path / name)
        assert name in str(info.value)
        assert "\n" not in str(info.value)
    with pytest.raises(FileNotFoundError, match="no such label file"):
        read_labels(tmp_path / "none.png")


def test_an_image_and_its_label_may_write_an_accent_differently(root):
    composed = "caf\N{LATIN SMALL LETTER E WITH ACUTE}.png"
    image = next((root / "images" / "val").glob("00000.*"))
    label_file(root, split="val").rename(root / "annotations" / "val" / composed)
    image.rename(image.with_name(unicodedata.normalize("NFD", Path(composed).with_suffix(image.suffix).name)))
    assert len(open_segmentation(root, "val", 255, None)[0]) == 2


# names ----------------------------------------------------------------------------------------------------------------
def test_names_of_the_classes(root):
    assert open_segmentation(root, "val", 255, None)[1] == ["ground", "disc", "square", "triangle", "cross"]
    # of the same file, with label 0 or the last label ignored
    assert open_segmentation(root, "val", 0, None)[1] == ["disc", "square", "triangle", "cross"]
    assert open_segmentation(root, "val", 4, None)[1] == ["ground", "disc", "square", "triangle"]
    (root / "classes.txt").write_text("\ufeffa b\nc\n\n", encoding="utf-8")
    assert open_segmentation(root, "val", 255, 2)[1] == ["a b", "c"]
    with pytest.raises(ValueError, match=r"names 2 classes, but the number of classes is set to 3"):
        open_segmentation(root, "val", 255, 3)
    (root / "classes.txt").write_text("a\nb\na\n")
    with pytest.raises(ValueError, match="duplicate class name 'a'"):
        open_segmentation(root, "val", 255, None)
    (root / "classes.txt").write_text("0 a\n2 c\n")
    with pytest.raises(ValueError, match="without a gap"):
        open_segmentation(root, "val", 255, None)
    for text in ("", "\n\n", "0 other\n"):  # the last is ignored
        (root / "classes.txt").write_text(text)
        with pytest.raises(
            ValueError, match=r"classes\.txt names no class: write the class names into it, one per line"
        ):
            open_segmentation(root, "val", 0, None)
    for content in (b"\xff\xfe\x00", "a\nb\n".encode("utf-16")):
        (root / "classes.txt").write_bytes(content)
        with pytest.raises(ValueError, match=r"classes\.txt is not text in UTF-8"):
            open_segmentation(root, "val", 255, None)
    (root / "classes.txt").unlink()
    assert open_segmentation(root, "val", 0, 2)[1] == ["class 1", "class 2"]
    with pytest.raises(ValueError, match=r"no classes\.txt and no number of classes"):
        open_segmentation(root, "val", 0, None)
    (root / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n1\t0.1\t2\t3\t1\twall, fence\n")
    assert open_segmentation(root, "val", 0, None)[1] == ["wall"]


# layout ---------------------------------------------------------------------------------------------------------------
def test_samples_are_an_image_and_its_classes(root):
    data, _ = open_segmentation(root, "train", 255, None)
    image, classes = data[1]
    assert (len(data), image.size, classes.shape) == (3, (56, 40), (40, 56))
    assert np.array_equal(classes, np.asarray(Image.open(label_file(root, 1))))
    data.check_labels()


def test_folders_below_a_split_are_followed(root):
    for what in ("images", "annotations"):
        (root / what / "train" / "town").mkdir()
        (root / what / "train" / "00000.png").rename(root / what / "train" / "town" / "a.png")
    data, _ = open_segmentation(root, "train", 255, None)
    assert data.names == ["00001", "00002", "town/a"]


def test_missing_labels_are_named(root):
    label_file(root, 1).unlink()
    with pytest.raises(FileNotFoundError, match=r"images/train/00001\.png: no label .*annotations/train/00001\.png"):
        open_segmentation(root, "train", 255, None)


def test_missing_folders_are_named(tmp_path, root):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_segmentation(root / "none", "train", 255, None)
    with pytest.raises(FileNotFoundError, match="no folder images/test"):
        open_segmentation(root, "test", 255, None)


def test_labels_of_another_size_are_named(root):
    Image.new("L", (56, 41)).save(label_file(root))
    data, _ = open_segmentation(root, "train", 255, None)
    for look in (lambda: data[0], data.check_labels):
        with pytest.raises(ValueError, match=r"00000\.png has 56x41 pixels, its image 00000\.png 56x40"):
            look()


def test_a_wrong_rule_is_refused_before_a_run(root):
    (root / "classes.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"label 4 in \d+ pixels is not valid: labels 0\.\.1 are classes"):
        open_segmentation(root, "train", 255, None)[0].check_labels()
    for index in range(3):  # masks as drawing programs save them
        labels = np.asarray(Image.open(label_file(root, index)))
        save(np.where(labels > 0, 255, 0).astype(np.uint8), label_file(root, index))
    with pytest.raises(ValueError, match=r"hold only class 0 .*masks of 0 and 255 must be written as labels 0 and 1"):
        open_segmentation(root, "train", 255, None)[0].check_labels()


@pytest.mark.parametrize(("only", "ignore"), [(0, 255), (2, 255), (1, 0)])
def test_one_class_alone_is_no_wrong_rule(root, only, ignore):
    for index in range(3):  # only background, or one common class: others may be rare
        labels = np.full((40, 56), only, np.uint8)
        labels[0] = only if ignore else 0
        save(labels, label_file(root, index))
    open_segmentation(root, "train", ignore, None)[0].check_labels()


def test_a_broken_image_is_left_for_the_loop_to_count(root):
    (root / "images" / "train" / "00000.png").write_bytes(b"no image")
    data, _ = open_segmentation(root, "train", 255, None)
    data.check_labels()
    with pytest.raises(CorruptImage, match=r"00000\.png"):
        data[0]


# transforms -----------------------------------------------------------------------------------------------------------
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "distort": 0.0}


def painted(height, width, block=16):
    """Blocks of classes 0..3, and an image with one grey level per class."""
    classes = (np.add.outer(np.arange(height) // block, 2 * (np.arange(width) // block)) % 4).astype(np.int16)
    return Image.fromarray((40 + 60 * classes).astype(np.uint8)).convert("RGB"), classes


@pytest.mark.parametrize("hflip", [0.0, 1.0])
@pytest.mark.parametrize("size", [(96, 160), (40, 300), (31, 33)])
def test_image_and_classes_stay_together(size, hflip):
    image, classes = painted(*size)
    transform = SegmentationTrainTransform(SegmentationConfig(size=None, crop=64, hflip=hflip, **PLAIN))
    torch.manual_seed(0)
    for _ in range(12):
        pixels, labels = transform(image, classes)
        assert pixels.shape == (3, 64, 64)
        assert labels.shape == (64, 64)
        said = (pixels[0] * 255 - 40) / 60
        inside = labels != IGNORED
        assert (pixels[:, ~inside] == 0).all()  # padding
        wrong = ((said - labels).abs() > 0.5) & inside
        assert wrong.sum() < 0.2 * inside.sum()  # only edges, which bilinear resizing blurs


def test_a_mirrored_crop_is_mirrored():
    image, classes = painted(64, 64)
    config = {"size": None, "crop": 64, "scale": (1.0, 1.0), "cat_max_ratio": 1.0, **PLAIN}
    crops = [SegmentationTrainTransform(SegmentationConfig(hflip=p, **config))(image, classes) for p in (0.0, 1.0)]
    for one, other in zip(*crops, strict=True):
        assert torch.equal(one, other.flip(-1))
    assert torch.equal(crops[0][1], torch.from_numpy(classes))


def test_crops_with_several_classes_are_preferred():
    classes = np.zeros((64, 256), dtype=np.int16)
    classes[:, 192:] = 1
    image = Image.new("RGB", (256, 64))
    shares = {}
    for ratio in (0.75, 1.0):
        torch.manual_seed(0)
        config = SegmentationConfig(size=None, crop=64, scale=(1.0, 1.0), cat_max_ratio=ratio, **PLAIN)
        crops = [SegmentationTrainTransform(config)(image, classes)[1] for _ in range(60)]
        mixed = [0.25 < (crop == 1).float().mean() < 0.75 for crop in crops]
        shares[ratio] = sum(mixed) / len(mixed)
    assert shares[0.75] > 0.65
    assert shares[1.0] < 0.35


def test_distortion_changes_colours_and_nothing_else():
    image, classes = painted(64, 64)
    config = SegmentationConfig(size=None, crop=64, scale=(1.0, 1.0), hflip=0.0, distort=1.0, cat_max_ratio=1.0)
    torch.manual_seed(0)
    one, other = (SegmentationTrainTransform(config)(image, classes) for _ in range(2))
    assert torch.equal(one[1], other[1])
    assert not torch.equal(one[0], other[0])
    grey = Image.new("RGB", (8, 8), (120, 120, 120))  # without saturation, a change of hue has no effect
    assert len(np.unique(np.asarray(SegmentationTrainTransform(config)._distorted(grey)))) == 1


@pytest.mark.parametrize(("size", "expected"), [(None, (100, 300)), (50, (50, 150)), (200, (200, 600))])
def test_evaluation_resizes_the_shorter_side(size, expected):
    image, classes = painted(100, 300)
    pixels, labels = SegmentationEvalTransform(SegmentationConfig(size=size))(image, classes)
    assert tuple(pixels.shape) == (3, *expected)
    assert np.array_equal(labels, classes)
    long = SegmentationEvalTransform(SegmentationConfig(size=64)).image(Image.new("RGB", (1000, 10)))
    assert tuple(long.shape) == (3, 3, 256)  # never longer than four times the size


def test_bad_settings_are_refused():
    for name, value in {
        "crop": 0, "size": 0, "num_classes": 0, "ignore": -1, "scale": (2.0, 0.5), "cat_max_ratio": 1.5,
        "hflip": -0.1, "distort": 2.0, "stride": 4, "std": (1.0, 0.0, 1.0),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=name) as info:
            SegmentationConfig(**{name: value})
        assert "\n" not in str(info.value)


# real data ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "split", "ignore", "count", "first", "last"),
    [("camvid", "train", 11, 41, "Sky", "Bicyclist"), ("ade20k_sample", "val", 0, 3, "wall", "flag")],
)
def test_real_layouts_open(name, split, ignore, count, first, last):
    if not (REAL / name).is_dir():
        pytest.skip(f"needs {name} in {REAL} (SOLA_DATA)")
    config = SegmentationConfig(ignore=ignore, size=64, crop=64)
    data, names = open_segmentation(REAL / name, split, ignore, None, SegmentationTrainTransform(config))
    assert (len(data), names[0], names[-1]) == (count, first, last)
    data.check_labels()
    pixels, classes = data[count - 1]
    assert pixels.isfinite().all()
    assert classes.min() >= IGNORED
    assert classes.max() < len(names)
