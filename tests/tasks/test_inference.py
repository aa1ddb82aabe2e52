# SPDX-License-Identifier: Apache-2.0
"""Inference: windows cover the image, equivalent views give equal results, saving memory changes no result."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import interpolate

from sola_vision.tasks.inference import Inference, _starts, best_classes


@pytest.fixture
def pointwise():
    """A pointwise network, whose output does not depend on the window."""
    torch.manual_seed(0)
    return nn.Conv2d(3, 6, 1)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 40])
@pytest.mark.parametrize("stride", [1, 5, 8])
def test_windows_cover_everything_and_stay_inside(length, stride):
    starts = _starts(length, 8, stride)
    assert {pixel for start in starts for pixel in range(start, min(start + 8, length))} == set(range(length))
    assert all(start >= 0 and start + 8 <= max(length, 8) for start in starts)
    assert len(set(starts)) == len(starts)
    assert all(later - earlier <= stride for earlier, later in pairwise(starts))


@pytest.mark.parametrize("size", [(16, 16), (23, 41), (9, 64), (64, 9), (5, 5)])
def test_sliding_windows_of_a_pointwise_network_change_nothing(pointwise, size):
    image = torch.randn(1, 3, *size)
    whole = Inference().scores(pointwise, image)
    for slide, stride in ((16, None), (16, 16), (16, 5), (7, 3)):
        torch.testing.assert_close(Inference(slide=slide, stride=stride).scores(pointwise, image), whole)


def test_windows_are_what_the_network_sees():
    seen = []

    class Spy(nn.Module):
        def forward(self, x):
            seen.append(tuple(x.shape[-2:]))
            return x

    Inference(slide=32, stride=20).scores(Spy(), torch.randn(1, 3, 50, 70))
    assert set(seen) == {(32, 32)}
    assert len(seen) == 2 * 3


def test_overlaps_are_averaged():
    class Where(nn.Module):
        """Return the distance of each pixel from the left edge of the window."""

        def forward(self, x):
            return torch.arange(x.shape[-1]).expand(1, 1, *x.shape[-2:]).float()

    scores = Inference(slide=4, stride=2).scores(Where(), torch.zeros(1, 3, 4, 6))
    assert scores[0, 0, 0].tolist() == [0, 1, (2 + 0) / 2, (3 + 1) / 2, 2, 3]


def test_mirroring_of_a_pointwise_network_changes_nothing(pointwise):
    image = torch.randn(1, 3, 9, 14)
    probabilities = Inference().scores(pointwise, image).softmax(1)
    torch.testing.assert_close(Inference(flip=True).scores(pointwise, image), probabilities)


def test_flip_makes_the_result_mirror_with_the_image():
    torch.manual_seed(0)
    network = nn.Conv2d(3, 6, 5, padding=2)
    image, look = torch.randn(1, 3, 12, 17), Inference(flip=True, scales=(0.5, 1.0))
    torch.testing.assert_close(look.scores(network, image.flip(-1)), look.scores(network, image).flip(-1))


def test_scales_average_probabilities(pointwise):
    image = torch.ones(1, 3, 20, 30) * torch.randn(1, 3, 1, 1)  # of one colour, so scaling changes nothing
    expected = Inference().scores(pointwise, image).softmax(1)
    scores = Inference(scales=(0.5, 1.0, 1.75)).scores(pointwise, image)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.sum(1), torch.ones(1, 20, 30))


@pytest.mark.parametrize("size", [(16, 24), (37, 51), (8, 8)])
def test_best_classes_are_those_of_the_interpolated_scores(size):
    torch.manual_seed(0)
    scores = torch.randn(1, 40, 16, 24)
    expected = interpolate(scores, size=size, mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(best_classes(scores, size), expected)


def test_bad_settings_are_refused():
    scales = ((), (1.0, 0.0), (math.inf,), (1.0, math.nan))
    for wrong in ({"slide": 0}, {"stride": 4}, {"slide": 8, "stride": 9}, *({"scales": some} for some in scales)):
        with pytest.raises(ValueError, match=r"slide|stride|scales"):
            Inference(**wrong)
