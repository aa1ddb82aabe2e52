# SPDX-License-Identifier: Apache-2.0
"""COCO's compressed masks: encoding and decoding, and invalid lengths that must not reach the library."""

import numpy as np
import pytest

from sola_vision.data import encode_mask, mask_library, unusable_mask
from sola_vision.data.run_lengths import _unpack, run_lengths

pytest.importorskip("faster_coco_eval", reason="needs the extra [det]")


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (33, 20), (400, 301)])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_masks_come_back_and_their_lengths_are_read_as_they_are(size, share):
    mask = (np.random.default_rng(3).random(size) < share).astype(np.uint8)
    packed = encode_mask(mask)
    assert unusable_mask(packed, size) is None
    assert (mask_library().decode(run_lengths(packed, size)) == mask).all()
    lengths = _unpack(packed["counts"])
    ends = np.repeat(np.arange(len(lengths)) % 2, lengths)
    assert (ends == mask.T.ravel()).all()
    plain = {"size": list(size), "counts": lengths.tolist()}
    assert unusable_mask(plain, size) is None
    assert (mask_library().decode(run_lengths(plain, size)) == mask).all()


@pytest.mark.parametrize(
    "counts", ["zzzzzzzzzzzzz", "1", "~~~", "P", "PPPPPPPPPPPPPPPPPPPP1", "\u20ac", [5, 5000], [-5, 605], [1.5, 598.5]]
)
def test_lengths_that_do_not_add_up_are_found_out(counts):
    assert "add up" in unusable_mask({"size": [20, 30], "counts": counts}, (20, 30))


def test_lengths_of_a_larger_image_do_not_pass():
    packed = encode_mask(np.ones((40, 30), np.uint8))
    assert "another size" in unusable_mask(packed, (20, 30))
    assert "add up" in unusable_mask({**packed, "size": [20, 30]}, (20, 30))
