# SPDX-License-Identifier: Apache-2.0
"""Counts with their nouns."""

import pytest

from sola_vision.wording import amount


@pytest.mark.parametrize(
    ("number", "words", "says"),
    [
        (0, ("image",), "0 images"),
        (1, ("image",), "1 image"),
        (1.0, ("epoch",), "1 epoch"),
        (0.5, ("epoch",), "0.5 epochs"),
        (1281167, ("image",), "1,281,167 images"),
        (1, ("class", "classes"), "1 class"),
        (2, ("class", "classes"), "2 classes"),
    ],
)
def test_amount_has_the_form_of_the_noun(number, words, says):
    assert amount(number, *words) == says
