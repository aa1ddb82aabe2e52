# SPDX-License-Identifier: Apache-2.0
"""COCO folders: layouts, labels, masks of every kind, and the handling of invalid annotations."""

import itertools
import json
import logging
import math
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sola_vision.data import CocoFolder, encode_mask, read_truth
from sola_vision.data.scenes import write_coco

pytest.importorskip("faster_coco_eval", reason="needs the extra [det]")

DATA = Path(os.environ.get("SOLA_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")).resolve()
SQUARE = [[2, 3, 8, 3, 8, 9, 2, 9]]  # x 2..8, y 3..9


def annotation(number=1, image=7, category=5, box=(2, 3, 6, 6), **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": list(box), **more}


def write(root, annotations, *, size=(20, 30), categories=((5, "cat"), (90, "dog")), images=(7,), files=True):
    """A val split with images of `size` (H, W)."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "val").mkdir(exist_ok=True)
    listed = []
    for number in images:
        name = f"{number}.png"
        listed.append({"id": number, "file_name": name, "height": size[0], "width": size[1]})
        if files:
            Image.fromarray(np.full((*size, 3), number, np.uint8)).save(root / "val" / name)
    document = {
        "images": listed,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for number, name in categories],
    }
    (root / "annotations" / "instances_val.json").write_text(json.dumps(document))
    return root


def test_generated_scenes_open_and_their_masks_are_those_of_the_scenes(tmp_path):
    write_coco(tmp_path, train=3, val=2, size=(64, 96))
    data = CocoFolder(tmp_path, "train")
    assert (len(data), data.masks, data.classes) == (3, True, ["disc", "square", "triangle", "cross"])
    image, objects = data[0]
    assert image.size == (96, 64)
    for index, (x0, y0, x1, y1) in enumerate(objects.boxes):
        mask = objects.mask(index)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask.shape == (64, 96)
        # COCO fills polygons by another rule than the scenes, half a pixel wider
        tight = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        assert np.abs(tight - [x0, y0, x1, y1]).max() <= 1


@pytest.mark.parametrize(
    ("annotations", "images"),
    [
        ("annotations/instances_val2017.json", "val2017"),
        ("annotations/instances_val.json", "images/val"),
        ("valid/_annotations.coco.json", "valid"),
    ],
)
def test_other_layouts(tmp_path, annotations, images):
    write(tmp_path / "source", [annotation()])
    for name, source in ((annotations, "annotations/instances_val.json"), (f"{images}/7.png", "val/7.png")):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_bytes((tmp_path / "source" / source).read_bytes())
    assert CocoFolder(tmp_path / "data", "val")[0][0].size == (30, 20)


def test_labels_follow_ids_that_are_not_contiguous(tmp_path):
    write(tmp_path, [annotation(category=90), annotation(2)], categories=((90, "dog"), (5, "cat"), (7, "emu")))
    data = CocoFolder(tmp_path, "val")
    assert (data.classes, data.category_ids) == (["cat", "emu", "dog"], [5, 7, 90])
    assert data.objects(0).labels.tolist() == [3, 1]
    # a checkpoint's classes in another order, with one that is missing here
    other = CocoFolder(tmp_path, "val", classes=["dog", "fox", "cat", "emu"])
    assert other.objects(0).labels.tolist() == [1, 3]
    assert len(set(other.category_ids)) == 4
    assert (other.category_ids[0], other.category_ids[2]) == (90, 5)
    with pytest.raises(ValueError, match="'emu'"):
        CocoFolder(tmp_path, "val", classes=["dog", "cat"])


def test_every_kind_of_mask(tmp_path):
    mask = np.zeros((20, 30), np.uint8)
    mask[3:9, 2:8] = 1
    plain = [len(list(run)) for _, run in itertools.groupby(mask.T.ravel().tolist())]  # starts with zeros
    kinds = [SQUARE, encode_mask(mask), {"size": [20, 30], "counts": plain}]
    kinds.append([SQUARE[0][:], [20, 12, 25, 12, 25, 16, 20, 16]])
    write(tmp_path, [annotation(i, segmentation=kind) for i, kind in enumerate(kinds, 1)])
    objects = CocoFolder(tmp_path, "val").objects(0)
    for index in range(3):
        assert (objects.mask(index) == mask).all()
    assert objects.mask(3).sum() > mask.sum()


def test_crowds_are_no_objects_but_truth(tmp_path):
    crowd = {"size": [20, 30], "counts": [0, 100, 500]}
    write(tmp_path, [annotation(segmentation=SQUARE), annotation(2, segmentation=crowd, iscrowd=1, box=(0, 0, 5, 20))])
    data = CocoFolder(tmp_path, "val")
    assert len(data.objects(0).boxes) == 1
    assert [a["iscrowd"] for a in data.truth()["annotations"]] == [0, 1]


def test_boxes_alone_and_mixed_masks(tmp_path):
    write(tmp_path / "boxes", [annotation(segmentation=[]), annotation(2)])
    assert not CocoFolder(tmp_path / "boxes", "val").masks
    with pytest.raises(ValueError, match="no mask for 2 of 2 objects"):
        CocoFolder(tmp_path / "boxes", "val", masks=True)
    write(tmp_path / "mixed", [annotation(segmentation=SQUARE), annotation(2)])
    with pytest.raises(ValueError, match=r"no mask for 1 of 2 objects \(the first: annotation 2\)"):
        CocoFolder(tmp_path / "mixed", "val")
    assert CocoFolder(tmp_path / "mixed", "val", masks=False).objects(0).segmentations is None


UNUSABLE = {
    "not finite": {"box": (1, 1, math.nan, 4)},
    "without area": {"box": (1, 1, 0, 4)},
    "outside the image": {"box": (31, 2, 4, 4)},
    "four numbers": {"box": (1, 2, 3)},
    "image not in the list": {"image": 8},
    "is not finite": {"box": (1, 1, 10**400, 4)},
    "of an image not": {"image": [7]},
    "another size": {"segmentation": {"size": [30, 20], "counts": [600]}},
    "size than the image": {"segmentation": {"size": 20, "counts": [600]}},
    "two integers": {"segmentation": {"size": [20.0, 30.0], "counts": [600]}},
    "do not add up": {"segmentation": {"size": [20, 30], "counts": [5, 5000]}},
    "add up to the image": {"segmentation": {"size": [20, 30], "counts": "zzzzzzzz"}},
    "run lengths that are not a string": {"segmentation": {"size": [20, 30], "counts": 5}},
    "three points": {"segmentation": [[1, 1, 4, 4]]},
    "far outside": {"segmentation": [[1, 1, 4, 4, math.nan, 2]]},
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_unusable_annotations_are_skipped_and_logged(tmp_path, caplog, reason):
    bad = {"segmentation": SQUARE, **UNUSABLE[reason]}
    write(tmp_path, [annotation(3, segmentation=SQUARE), annotation(4, **bad), annotation(5, **bad)])
    with caplog.at_level(logging.WARNING):
        data = CocoFolder(tmp_path, "val")
    assert len(data.objects(0).boxes) == 1
    (record,) = caplog.records
    for part in ("skipped 2 of 3 annotations", reason, "(annotation 4)"):
        assert part in record.getMessage()


def test_boxes_are_clipped_for_training_and_kept_as_written_for_scoring(tmp_path):
    write(tmp_path, [annotation(box=(-4, 15, 10, 10)), annotation(2, box=(1, 1, 0, 3), area=0)])
    data = CocoFolder(tmp_path, "val")
    assert data.objects(0).boxes.tolist() == [[0, 15, 6, 20]]
    truth = data.truth()["annotations"]
    assert [a["bbox"] for a in truth] == [[-4, 15, 10, 10], [1, 1, 0, 3]]
    assert [a["area"] for a in truth] == [100, 0]
    assert [a["id"] for a in truth] == [1, 2]


@pytest.mark.parametrize("segmentation", [[[1, 1, 4, 4]], {"size": [30, 20], "counts": [600]}])
def test_an_object_with_an_unusable_mask_keeps_its_box_for_scoring(tmp_path, caplog, segmentation):
    write(tmp_path, [annotation(3, segmentation=SQUARE), annotation(4, segmentation=segmentation)])
    with caplog.at_level(logging.WARNING):
        truth = read_truth(tmp_path / "annotations" / "instances_val.json")["annotations"]
    assert [(a["bbox"], bool(a["segmentation"])) for a in truth] == [([2, 3, 6, 6], True), ([2, 3, 6, 6], False)]
    (record,) = caplog.records
    for part in ("scoring skips 1 of 2 annotations", "for masks only (annotation 4)"):
        assert part in record.getMessage()


def test_iscrowd_and_area_may_be_null_but_not_text(tmp_path):
    write(tmp_path, [annotation(iscrowd=None, area=None)])
    file = tmp_path / "annotations" / "instances_val.json"
    assert len(CocoFolder(tmp_path, "val").objects(0).boxes) == 1
    assert [(a["iscrowd"], a["area"]) for a in read_truth(file)["annotations"]] == [(0, 36)]
    for name, value in (("iscrowd", "0"), ("area", "36"), ("area", 10**400)):
        write(tmp_path, [annotation(3, **{name: value})])
        with pytest.raises(
            ValueError, match=rf"instances_val\.json: annotation 3 has (the )?{name} '?{str(value)[:9]}"
        ):
            read_truth(file)


def test_missing_area_is_that_of_the_mask(tmp_path):
    write(tmp_path, [annotation(segmentation=SQUARE, box=(0, 0, 20, 20))])
    assert read_truth(tmp_path / "annotations" / "instances_val.json")["annotations"][0]["area"] == 36


def test_images_without_objects(tmp_path):
    write(tmp_path, [annotation()], images=(7, 9))
    assert len(CocoFolder(tmp_path, "val")) == 2
    assert CocoFolder(tmp_path, "val").objects(1).boxes.shape == (0, 4)
    assert CocoFolder(tmp_path, "val", keep_empty=False).image_ids == [7]


def test_an_image_of_another_size_and_a_missing_one_are_errors_of_that_image(tmp_path, caplog):
    write(tmp_path, [annotation()], images=(7, 8, 9))
    Image.new("RGB", (20, 30)).save(tmp_path / "val" / "8.png")
    (tmp_path / "val" / "9.png").unlink()
    with caplog.at_level(logging.WARNING):
        data = CocoFolder(tmp_path, "val")
    assert "1 of 3 image files not found (the first: 9.png)" in caplog.text
    assert data[0][0].size == (30, 20)
    with pytest.raises(ValueError, match=r"8\.png is 30x20, but 20x30 in "):
        data[1]
    with pytest.raises(FileNotFoundError, match=r"9\.png"):
        data[2]


def test_a_file_is_found_in_either_unicode_form(tmp_path):
    composed = "caf\N{LATIN SMALL LETTER E WITH ACUTE}.png"
    write(tmp_path, [annotation()])
    file = tmp_path / "annotations" / "instances_val.json"
    file.write_text(file.read_text().replace("7.png", json.dumps(composed)[1:-1]))
    (tmp_path / "val" / "7.png").rename(tmp_path / "val" / unicodedata.normalize("NFD", composed))
    assert CocoFolder(tmp_path, "val")[0][0].size == (30, 20)


def test_sides_may_be_written_as_whole_floats(tmp_path):
    write(tmp_path, [annotation(segmentation=SQUARE)], size=(20, 30))
    file = tmp_path / "annotations" / "instances_val.json"
    file.write_text(file.read_text().replace('"width": 30', '"width": 30.0'))
    data = CocoFolder(tmp_path, "val")
    assert data[0][0].size == (30, 20)
    assert data.objects(0).mask(0).shape == (20, 30)
    assert type(read_truth(file)["images"][0]["width"]) is int


def change(**changes):
    def edit(document):
        for name, value in changes.items():
            document[name] = value
        return document

    return edit


IMAGE = {"id": 7, "file_name": "7.png", "height": 20, "width": 30}
REFUSED = {
    "no list 'annotations'": change(annotations=None),
    "no list 'images'": lambda _: [1, 2],
    "lists no images": change(images=[]),
    "lists no categories": change(categories=[]),
    "no objects": change(annotations=[]),
    r"integers above 0 .got \[0, 30\]": change(images=[{**IMAGE, "height": 0}]),
    r"integers above 0 .got \[20, 30\.5\]": change(images=[{**IMAGE, "width": 30.5}]),
    "integer id and a file_name": change(images=[{"id": "7"}]),
    "duplicate image id 7": change(images=[IMAGE, IMAGE]),
    "must lie below": change(images=[{**IMAGE, "file_name": "../../secret.png"}]),
    "duplicate category 6 'cat'": change(categories=[{"id": 5, "name": "cat"}, {"id": 6, "name": "cat"}]),
    "category_id 5": change(categories=[{"id": 6, "name": "dog"}]),
    r"category_id \[5\]": change(annotations=[annotation(category=[5])]),
    "not found, the only image listed in": change(images=[{**IMAGE, "file_name": "elsewhere.png"}]),
}


@pytest.mark.parametrize("says", REFUSED)
def test_a_document_that_is_wrong_is_refused_in_one_line(tmp_path, says):
    write(tmp_path, [annotation()])
    file = tmp_path / "annotations" / "instances_val.json"
    file.write_text(json.dumps(REFUSED[says](json.loads(file.read_text()))))
    with pytest.raises((ValueError, FileNotFoundError), match=says) as error:
        CocoFolder(tmp_path, "val")
    assert "\n" not in str(error.value)


def test_invalid_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected ROOT/annotations"):
        CocoFolder(tmp_path / "nowhere", "val")
    with pytest.raises(ValueError, match="no annotations of the split train"):
        CocoFolder(write(tmp_path, [annotation()]), "train")
    (tmp_path / "annotations" / "instances_val.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        CocoFolder(tmp_path, "val")


@pytest.mark.parametrize(
    ("name", "masks", "counts"),
    [("coco_mini", True, (68, 28)), ("bccd", False, (69, 22)), ("dsb2018_nuclei", True, (486, 93))],
)
def test_real_data_opens(name, masks, counts):
    if not (DATA / name).is_dir():
        pytest.skip(f"REAL DATA ABSENT: {DATA / name}; set SOLA_DATA to the folder that holds {name}")
    for split, count in zip(("train", "val"), counts, strict=True):
        data = CocoFolder(DATA / name, split)
        assert (len(data), data.masks) == (count, masks)
        assert not masks or data.objects(3).mask(0).any()
