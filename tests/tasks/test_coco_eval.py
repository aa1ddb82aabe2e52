# SPDX-License-Identifier: Apache-2.0
"""COCO's metrics: equal to pycocotools, equal to hand-computed values, and results that cannot be scored."""

import copy
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from sola_vision.data import encode_mask
from sola_vision.tasks.coco_eval import check_results, score

pytest.importorskip("faster_coco_eval", reason="needs the extra [det]")

DATA = Path(os.environ.get("SOLA_DATA", Path(__file__).parents[2] / ".." / "shared" / "data")).resolve()

# the metrics of pycocotools 2.0.11 for COCO's official fake results of 100 images of val2014
OFFICIAL = {
    "bbox": [
        0.504580698725,
        0.69697272473,
        0.57298166699,
        0.585625720941,
        0.519399694804,
        0.501397898635,
        0.386812779646,
        0.593679576284,
        0.595352982878,
        0.639810962611,
        0.566420597899,
        0.564290598291,
    ],
    "segm": [
        0.319545275858,
        0.562288397252,
        0.298926534121,
        0.3873740316,
        0.310182724034,
        0.326933907101,
        0.268229722571,
        0.415448681149,
        0.41683949922,
        0.469449862275,
        0.376759226662,
        0.381471509972,
    ],
}


@pytest.mark.parametrize("kind", OFFICIAL)
def test_official_results_have_the_numbers_of_pycocotools(kind):
    folder = DATA / "coco_eval_fixture"
    if not folder.is_dir():
        pytest.skip(f"REAL DATA ABSENT: {folder}; set SOLA_DATA to the folder that holds coco_eval_fixture")
    truth = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / f"instances_val2014_fake{kind}100_results.json").read_text())
    assert check_results(results, truth, kind, "fake") is results
    before = copy.deepcopy(results[:3])
    numbers = score(truth, results, kind).numbers
    assert list(numbers) == ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    assert np.abs(np.array(list(numbers.values())) - OFFICIAL[kind]).max() < 1e-9
    assert results[:3] == before  # the library may only modify a copy


def square(x, y, side, size=(200, 200)):
    mask = np.zeros(size, np.uint8)
    mask[y : y + side, x : x + side] = 1
    return encode_mask(mask)


def truth_of(*objects, images=2):
    """objects: (image, category, x, y, side)."""
    annotations = [
        {
            "id": number,
            "image_id": image,
            "category_id": category,
            "bbox": [x, y, side, side],
            "area": side * side,
            "segmentation": square(x, y, side),
            "iscrowd": 0,
        }
        for number, (image, category, x, y, side) in enumerate(objects, 1)
    ]
    return {
        "images": [{"id": n, "file_name": f"{n}.png", "height": 200, "width": 200} for n in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}],
    }


def found(image, category, x, y, side, value):
    return {
        "image_id": image,
        "category_id": category,
        "bbox": [x, y, side, side],
        "segmentation": square(x, y, side),
        "score": value,
    }


TRUTH = truth_of((1, 3, 10, 10, 20), (1, 3, 100, 100, 50), (2, 8, 20, 20, 120))


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_perfect_results_have_one_everywhere_and_none_have_zero(kind):
    perfect = [
        found(a["image_id"], a["category_id"], a["bbox"][0], a["bbox"][1], a["bbox"][2], 0.9)
        for a in TRUTH["annotations"]
    ]
    numbers = score(TRUTH, perfect, kind).numbers
    assert [numbers[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")] == [1] * 7
    # one detection an image: half of the cats, all of the dogs
    assert numbers["AR1"] == 0.75
    assert score(TRUTH, [], kind).numbers["AP"] == 0


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_numbers_that_can_be_counted_by_hand(kind):
    # the first of two cats, a wrong cat with a lower score, no dog
    results = [found(1, 3, 10, 10, 20, 0.9), found(2, 3, 150, 150, 20, 0.5)]
    one = score(TRUTH, results, kind)
    # precision is 1 up to recall 0.5, which are 51 of the 101 recalls, and 0 after that
    assert one.average(label=0) == pytest.approx(51 / 101)
    assert one.average(label=1) == 0
    assert one.numbers["AP"] == pytest.approx(51 / 101 / 2)
    assert one.curve(0)[:51].tolist() == [1] * 51
    assert one.curve(0)[51:].tolist() == [0] * 50
    assert one.classes == ["cat", "dog"]


def test_an_overlap_counts_at_the_thresholds_below_it():
    # 20x20 against 20x20 moved by 4: intersection 320, union 480, IoU 2/3
    one = score(TRUTH, [found(1, 3, 14, 10, 20, 0.9)], "bbox")
    assert one.average(label=0, threshold=0.65) == pytest.approx(51 / 101)
    assert one.average(label=0, threshold=0.7) == 0


def test_small_and_large_masks_go_by_their_own_area_not_by_the_box_beside_them():
    # a mask of 20x20 with the box of the large object: without that box the mask is small
    result = {**found(1, 3, 10, 10, 20, 0.9), "bbox": [0, 0, 199, 199]}
    numbers = score(truth_of((1, 3, 10, 10, 20)), [result], "segm").numbers
    assert numbers["APs"] == 1
    assert math.isnan(numbers["APl"])


def test_max_dets_decides_how_many_of_an_image_count():
    truth = truth_of(*((1, 3, 15 * n, 15 * m, 10) for n in range(12) for m in range(10)))
    results = [found(1, 3, 15 * n, 15 * m, 10, 0.9 - 0.001 * (n + 12 * m)) for n in range(12) for m in range(10)]
    assert score(truth, results, "bbox").numbers["AR100"] == pytest.approx(100 / 120)
    assert score(truth, results, "bbox", max_dets=120).numbers["AR120"] == 1
    assert score(truth, results, "bbox", max_dets=120).numbers["AP"] == 1
    assert score(truth, results, "bbox", max_dets=3).max_dets == (1, 3, 3)


def test_a_crowd_is_neither_missed_nor_a_mistake():
    truth = copy.deepcopy(TRUTH)
    truth["annotations"][1]["iscrowd"] = 1
    results = [found(1, 3, 10, 10, 20, 0.5), found(1, 3, 100, 100, 30, 0.9), found(1, 3, 110, 110, 30, 0.8)]
    assert score(truth, results, "bbox").average(label=0) == 1


def test_an_object_without_a_mask_counts_for_boxes_alone():
    truth = copy.deepcopy(TRUTH)
    truth["annotations"][1] |= {"segmentation": None, "unmasked": True}
    results = [found(1, 3, 10, 10, 20, 0.9)]
    assert score(truth, results, "bbox").average(label=0) == pytest.approx(51 / 101)
    assert score(truth, results, "segm").average(label=0) == 1


def test_only_the_images_that_were_seen_count():
    results = [found(1, 3, 10, 10, 20, 0.9), found(1, 3, 100, 100, 50, 0.9)]
    assert score(TRUTH, results, "bbox", image_ids=[1]).numbers["AP"] == 1
    assert math.isnan(score(TRUTH, results, "bbox", image_ids=[1]).average(label=1))


def test_the_order_of_the_results_changes_nothing():
    results = [found(1, 3, 10, 10, 20, 0.9), found(2, 3, 150, 150, 20, 0.5), found(2, 8, 22, 20, 120, 0.3)]
    one, other = score(TRUTH, results, "segm"), score(TRUTH, results[::-1], "segm")
    assert np.array_equal(one.precision, other.precision)


GOOD = found(1, 3, 10, 10, 20, 0.9)
WRONG = {
    "list of results": {"a": 1},
    "must have image_id": [{"score": 1}],
    "image_id 77": [{**GOOD, "image_id": 77}],
    "category_id 4": [{**GOOD, "category_id": 4}],
    r"image_id \[1\]": [{**GOOD, "image_id": [1]}],
    r"category_id \[3\]": [{**GOOD, "category_id": [3]}],
    "finite number .got 1000": [{**GOOD, "score": 10**400}],
    "score must be a finite number .got nan": [{**GOOD, "score": math.nan}],
    "finite number .got 'high'": [{**GOOD, "score": "high"}],
    "has no": [{"image_id": 1, "category_id": 3, "score": 1}],
    "four finite numbers": [{**GOOD, "bbox": [1, 2, 3]}],
    "compressed run lengths": [{**GOOD, "segmentation": [[1, 1, 5, 1, 5, 5]]}],
    "another size than the image .image size 200x200": [{**GOOD, "segmentation": {"size": [5, 5], "counts": "1"}}],
    "do not add up": [{**GOOD, "segmentation": {"size": [200, 200], "counts": "zzzzzzzzzzzzz"}}],
}


@pytest.mark.parametrize("says", WRONG)
def test_results_that_cannot_be_scored_are_refused(says):
    kind = "segm" if "run" in says or "size" in says or "add up" in says else "bbox"
    with pytest.raises(ValueError, match=says) as error:
        check_results(WRONG[says], TRUTH, kind, "results.json")
    assert "\n" not in str(error.value)
