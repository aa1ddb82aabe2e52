# SPDX-License-Identifier: Apache-2.0
"""The mini-languages: round trips, derived facts, and errors that point at the place."""

import random

import pytest

from sola_vision.schedule import Layer, parse_bridges, parse_schedule


@pytest.mark.parametrize("seed", range(20))
def test_parse_schedule_gives_its_text_back(seed):
    draw = random.Random(seed)
    stages = ["".join(draw.choices("LS", k=draw.randint(1, 9))) for _ in range(draw.randint(1, 5))]
    schedule = parse_schedule("/".join(stages))
    assert str(schedule) == "/".join(stages)
    assert schedule.depths == tuple(map(len, stages))
    assert "".join(map(schedule.kind, schedule.layers)) == "".join(stages)
    assert parse_schedule(str(schedule)) == schedule


@pytest.mark.parametrize(
    ("text", "position", "rule"),
    [
        ("", 1, "at least one layer"),
        ("LL/LX", 5, "'X' is not a layer"),
        ("Ll", 2, "write 'L'"),
        ("LL//LS", 4, "a stage needs"),
        ("/LL", 1, "a stage needs"),
        ("LL/", 4, "a stage needs"),
        ("LL LS", 3, "' ' is not a layer"),
    ],
)
def test_parse_schedule_points_at_the_error(text, position, rule):
    with pytest.raises(ValueError, match=rule) as error:
        parse_schedule(text)
    assert f"position {position}:" in str(error.value)
    assert "\n" not in str(error.value)


def test_parse_bridges_gives_its_text_back():
    text = "1.2>3.3 2.2>3.6 3.2>4.2"
    bridges = parse_bridges(text, "LL/LL/LLSLLS/LS")
    assert str(bridges) == text
    assert bridges.bridges[0].source == Layer(0, 1)
    assert bridges.bridges[0].target == Layer(2, 2)
    assert str(parse_bridges("  1.2>3.3   2.2>3.3 ")) == "1.2>3.3 2.2>3.3"
    assert parse_bridges("").bridges == ()


@pytest.mark.parametrize(
    ("text", "position", "rule"),
    [
        ("1.2-3.3", 1, "is not a bridge"),
        ("1.2>3.3 x", 9, "is not a bridge"),
        ("0.2>3.3", 1, "count from 1"),
        ("1.2>3.0", 7, "count from 1"),
        ("3.3>1.2", 1, "does not go forward"),
        ("3.2>3.2", 1, "does not go forward"),
        ("1.2>3.3 1.2>3.3", 9, "duplicate bridge 1.2>3.3"),
        ("1.3>3.3", 1, "no layer 1.3; it has 1.1 to 1.2"),
        ("1.2>5.1", 5, "no layer 5.1"),
        ("1.2>3.4", 5, "layer 3.4 of LL/LL/LLSLLS/LS is L"),
        ("3.3>3.6", 1, "layer 3.3 of LL/LL/LLSLLS/LS is S"),
    ],
)
def test_parse_bridges_points_at_the_error(text, position, rule):
    with pytest.raises(ValueError, match=rule) as error:
        parse_bridges(text, "LL/LL/LLSLLS/LS")
    assert f"position {position}:" in str(error.value)
    assert "\n" not in str(error.value)
