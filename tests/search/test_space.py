# SPDX-License-Identifier: Apache-2.0
"""Spaces, what schedules cost, and which of them meet a budget."""

import itertools

import pytest

from sola_vision import SolaConfig, SolaVision
from sola_vision.analysis.cost import count
from sola_vision.search import Costs, Space, latency_costs, mac_costs, rule

CONFIG = SolaConfig(schedule="L/LLLL/L", dims=(8, 16, 16), patch_size=1, img_size=16, head_dim=8, num_classes=4)
SPACE = Space("L/????/L")


def test_schedules_and_kinds_are_opposites():
    assert len(list(SPACE)) == len(set(SPACE)) == 16
    for kinds in SPACE:
        assert SPACE.kinds(SPACE.schedule(kinds)) == kinds
    assert SPACE.schedule("LSLS") == "L/LSLS/L"
    assert list(map(str, SPACE.open_layers)) == ["2.1", "2.2", "2.3", "2.4"]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("LL/LL", "0 open layers"),
        ("?" * 17, "17 open layers"),
        ("L?X", "'X' is not a layer"),
        ("??//L", "at least one"),
    ],
)
def test_bad_spaces(template, says):
    with pytest.raises(ValueError, match=says):
        Space(template)


@pytest.mark.parametrize("schedule", ["L/LLL/L", "L/LLLLL/L", "S/LLLL/L", "L/LLLL", "L/LL/LL/"])
def test_schedules_that_do_not_fit_the_space(schedule):
    with pytest.raises(ValueError, match=r"does not fit the space|needs at least one layer"):
        SPACE.kinds(schedule)


@pytest.mark.parametrize("size", [(16, 16), (40, 24)])
def test_macs_add_up_to_those_of_the_whole_network(size):
    costs = mac_costs(CONFIG, SPACE, size)
    for kinds in ("LLLL", "SSSS", "LSLS", "SLLL"):
        network = SolaVision(CONFIG.with_changes(schedule=SPACE.schedule(kinds)), device="meta").eval()
        assert costs.of(kinds) == count(network, size).macs


def test_every_budget_between_two_levels_is_met_within_two_per_cent():
    costs = Costs(SPACE, 100.0, (3.0, 3.0, 3.0, 3.0), "MACs")
    for budget in (100.0, 101.4, 101.6, 104.0, 107.5, 112.0):
        met = costs.meeting(budget)
        assert met
        assert all(abs(costs.of(kinds) / budget - 1) <= 0.02 for kinds in met)


def test_between_levels_that_lie_far_apart_the_lower_one_is_taken():
    costs = Costs(SPACE, 100.0, (20.0, 20.0, 20.0, 20.0), "MACs")
    assert {kinds.count("S") for kinds in costs.meeting(135.0)} == {1}
    assert {kinds.count("S") for kinds in costs.meeting(140.5)} == {2}


@pytest.mark.parametrize("budget", [90.0, 130.0])
def test_a_budget_that_no_schedule_meets(budget):
    costs = Costs(SPACE, 100.0, (5.0, 5.0, 5.0, 5.0), "MACs")
    with pytest.raises(ValueError, match=r"no schedule of L/\?\?\?\?/L meets it; they cost .* to .*L/SSSS/L"):
        costs.meeting(budget)


def test_softmax_may_be_the_cheaper_kind():
    costs = Costs(SPACE, 100.0, (-5.0, -5.0, -5.0, -5.0), "MACs")
    assert (costs.cheapest, costs.dearest) == ("SSSS", "LLLL")
    assert {kinds.count("S") for kinds in costs.meeting(90.0)} == {2}


def test_the_papers_rule():
    space = Space("LL/LL/??????/LL")
    costs = Costs(space, 100.0, (10.0,) * 6, "MACs")
    assert rule(costs, 120.0) == "LLSLLS"
    assert rule(costs, 110.0) == "LLLLLS"
    assert rule(costs, 100.0) == "LLLLLL"
    assert rule(costs, 160.0) == "LLSLLS"


def test_latency_is_measured_for_every_stage():
    costs = latency_costs(CONFIG, Space("L/??LL/?"), (16, 16), rounds=3)
    assert costs.base > 0
    assert costs.extra[0] == costs.extra[1]  # layers of a stage are alike
    assert costs.unit == "seconds"


def test_costs_do_not_depend_on_the_order_of_layers_in_a_stage():
    costs = mac_costs(CONFIG, SPACE, (16, 16))
    assert len({costs.of("".join(kinds)) for kinds in set(itertools.permutations("SSLL"))}) == 1
