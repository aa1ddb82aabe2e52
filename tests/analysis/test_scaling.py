# SPDX-License-Identifier: Apache-2.0
"""Figure 1(b): growth of the costs, and measuring a point."""

import pytest

from sola_vision.analysis.scaling import NETWORKS, Point, counted, measured


def test_global_attention_grows_with_the_square_of_the_pixels():
    gmacs = {(p.network, p.size): p.gmacs for p in counted((64, 512))}
    assert len(gmacs) == 2 * len(NETWORKS)
    growth = {network: gmacs[network, 512] / gmacs[network, 64] for network in NETWORKS}
    # 64 times the pixels: linear cost would grow 64-fold, purely quadratic 4096-fold
    assert 64 <= growth["SoLA"] < 70
    assert growth["Swin"] < 70
    assert growth["SoLA full softmax"] > 600
    assert growth["DeiT"] > 700
    assert gmacs["SoLA", 512] == pytest.approx(10.829, abs=1e-3)


def test_a_point_is_measured_in_its_own_process():
    seen = []
    (point,) = measured([Point("SoLA", 32, 0.04)], threads=1, report=seen.append)
    assert seen == [point]
    assert 0 < point.seconds < 20
    assert 1 < point.mebibytes < 2000


def test_large_points_that_would_take_too_long_are_left_out():
    """The first is larger than 640 but no pace is known yet; the second is too expensive at any pace."""
    first, second = measured([Point("SoLA", 641, 1e-9), Point("SoLA", 642, 1e9)], threads=1)
    assert first.seconds is not None
    assert second.seconds is None
