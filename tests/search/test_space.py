# SPDX-License-Identifier: Apache-2.0
"""Spaces, the cost of schedules, and the schedules that meet a budget."""

import itertools

import pytest

from sola_vision import SolaConfig, SolaVision
from sola_vision.analysis.cost import count
from sola_vision.config import base, tiny
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
        ("?" * 17, "17 open layers and so 131,072 networks"),
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


def test_bridges_start_at_the_last_layer_of_an_earlier_stage():
    space = Space("LL/L?/???/?L", bridges=True)  # stages 2 and 3 end open, so none starts there
    assert space.letters == ("LS1",) * 5
    kinds = "LL1S1"
    assert space.schedule(kinds) == "LL/LL/LSS/SL"
    assert space.bridges_of(kinds) == "1.2>3.2 1.2>4.1"
    for kinds in space:
        assert space.kinds(space.schedule(kinds), space.bridges_of(kinds)) == kinds
    assert Space("LL/LL/??/?", bridges=True).letters == ("LS12", "LS12", "LS12")


@pytest.mark.parametrize("bridges", ["1.1>3.1", "1.2>3.1 1.2>4.1", "2.1>3.1"])
def test_bridges_that_do_not_fit_the_space(bridges):
    with pytest.raises(ValueError, match=r"does not fit the space .*: bridges start at 1.2, and one"):
        Space("LL/LS/??/S", bridges=True).kinds("LL/LS/SL/S", bridges)
    with pytest.raises(ValueError, match="bridges need --bridges"):
        Space("LL/LL/??/L").kinds("LL/LL/SL/L", "1.2>3.1")


def test_a_space_too_large_with_bridges():
    with pytest.raises(ValueError, match="10 open layers and so 1,048,576 networks, more than 65,536"):
        Space("L/L/??????????", bridges=True)


@pytest.mark.parametrize("size", [(16, 16), (40, 24)])
def test_macs_add_up_to_those_of_the_whole_network(size):
    costs = mac_costs(CONFIG, SPACE, size)
    bridged = mac_costs(CONFIG, Space("L/????/L", bridges=True), size)
    for kinds in ("LLLL", "SSSS", "LSLS", "SLLL", "L1LS", "1111"):
        network = SolaVision(bridged.space.config(CONFIG, kinds), device="meta").eval()
        assert bridged.of(kinds) == count(network, size).macs
        assert "1" in kinds or costs.of(kinds) == bridged.of(kinds)


def test_every_budget_between_two_levels_is_met_within_two_per_cent():
    costs = Costs(SPACE, 100.0, ({"S": 3.0},) * 4, "MACs")
    for budget in (100.0, 101.4, 101.6, 104.0, 107.5, 112.0):
        met = costs.meeting(budget)
        assert met
        assert all(abs(costs.of(kinds) / budget - 1) <= 0.02 for kinds in met)


def test_between_levels_that_lie_far_apart_the_lower_one_is_taken():
    costs = Costs(SPACE, 100.0, ({"S": 20.0},) * 4, "MACs")
    assert {kinds.count("S") for kinds in costs.meeting(135.0)} == {1}
    assert {kinds.count("S") for kinds in costs.meeting(140.5)} == {2}


@pytest.mark.parametrize("budget", [90.0, 130.0])
def test_a_budget_that_no_schedule_meets(budget):
    costs = Costs(SPACE, 100.0, ({"S": 5.0},) * 4, "MACs")
    with pytest.raises(ValueError, match=r"no schedule of L/\?\?\?\?/L meets it; they cost .* to .*L/SSSS/L"):
        costs.meeting(budget)


def test_softmax_may_be_the_cheaper_kind():
    costs = Costs(SPACE, 100.0, ({"S": -5.0},) * 4, "MACs")
    assert (costs.cheapest, costs.dearest) == ("SSSS", "LLLL")
    assert {kinds.count("S") for kinds in costs.meeting(90.0)} == {2}


def test_the_papers_rule():
    space = Space("LL/LL/??????/LL")
    costs = Costs(space, 100.0, ({"S": 10.0},) * 6, "MACs")
    assert rule(costs, 120.0) == "LLSLLS"
    assert rule(costs, 110.0) == "LLLLLS"
    assert rule(costs, 100.0) == "LLLLLL"
    assert rule(costs, 160.0) == "LLSLLS"


def test_the_papers_rule_gives_table_7_for_its_budgets():
    space = Space("LL/LL/??????/L?")
    costs = mac_costs(tiny(), space, (224, 224))
    assert space.schedule(rule(costs, costs.of(space.kinds(tiny().schedule)))) == tiny().schedule
    space = Space("LL/LL/????????????????/LS")
    # layers of a stage cost the same
    costs = Costs(space, 100.0, ({"S": 3.0},) * space.size, "MACs")
    assert space.schedule(rule(costs, costs.of(space.kinds(base().schedule)))) == base().schedule


def test_the_papers_rule_counts_from_the_end_of_each_stage():
    space = Space("??/?/???/?L??")
    costs = Costs(space, 100.0, ({"S": 10.0},) * space.size, "MACs")
    assert space.schedule(rule(costs, 190.0)) == "LS/L/LLS/LLLS"
    assert space.schedule(rule(costs, 120.0)) == "LL/L/LLS/LLLS"


def test_the_papers_rule_where_softmax_is_the_cheaper_kind():
    costs = Costs(Space("LL/LL/??????/LL"), 100.0, ({"S": -5.0},) * 6, "MACs")
    found = rule(costs, 75.0)
    assert costs.of(found) == 75.0
    assert found == "SSSSLS"


def test_latency_is_measured_for_every_stage():
    costs = latency_costs(CONFIG, Space("L/??LL/?", bridges=True), (16, 16), rounds=3)
    assert costs.base > 0
    assert [list(extra) for extra in costs.extra] == [["S", "1"], ["S", "1"], ["S", "1", "2"]]
    assert costs.extra[0] == costs.extra[1]  # layers of a stage are alike
    assert costs.unit == "seconds"


def test_costs_do_not_depend_on_the_order_of_layers_in_a_stage():
    costs = mac_costs(CONFIG, SPACE, (16, 16))
    assert len({costs.of("".join(kinds)) for kinds in set(itertools.permutations("SSLL"))}) == 1
