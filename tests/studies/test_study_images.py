# SPDX-License-Identifier: Apache-2.0
"""The images of studies and searches, and the split to select on."""

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from sola_vision.studies.images import Images


def test_chosen_classes_without_a_held_out_image_are_refused(tmp_path):
    for place in [f"train/{name}/{index}" for name in "abcd" for index in range(5)] + ["val/c/0", "val/d/0"]:
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{place}.png")
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"no held-out image, .* is of the 2 chosen classes"):
        Images(str(tmp_path), 8, None, None, str(names))
    names.write_text("a\nc\n")
    assert len(Images(str(tmp_path), 8, None, None, str(names)).val) == 1


@pytest.mark.parametrize(
    ("counts", "held"), [((60, 20, 4), (6, 2, 1)), ((20, 20, 20), (2, 2, 2)), ((38, 2, 2), (4, 1, 1))]
)
def test_a_share_of_each_class_is_held_back_and_none_loses_its_last_image(tmp_path, counts, held):
    for number, count in enumerate(counts):
        for split in ("train", "val"):
            folder = tmp_path / split / f"class{number}"
            folder.mkdir(parents=True)
            for index in range(count if split == "train" else 1):
                Image.fromarray(np.full((8, 8, 3), index, np.uint8)).save(folder / f"{index}.png")
    images = Images(str(tmp_path), 8, None, None)
    learnt, chosen = images.split(0.1)
    assert sorted(Counter(chosen.targets).items()) == list(enumerate(held))
    assert Counter(learnt.targets) + Counter(chosen.targets) == Counter(dict(enumerate(counts)))
    assert images.split(0.1)[1].targets == chosen.targets
