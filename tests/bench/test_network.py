# SPDX-License-Identifier: Apache-2.0
"""Comparison of networks: skipped ones, rows, ratios, memory measured in a separate process."""

import json

import pytest
import torch
from PIL import Image

from sola_vision.analysis.cost import build, count
from sola_vision.bench import network
from sola_vision.bench.network import Case, compare, plan
from sola_vision.bench.picture import draw
from sola_vision.bench.rounds import Protocol, Times


def test_a_network_that_refuses_a_size_is_skipped_with_a_line():
    said = []
    cases = plan(["sola_nano", "efficientformer_l1"], [(224, 224), (64, 96)], report=said.append)
    assert [(c.model, c.height, c.width) for c in cases] == [
        ("sola_nano", 224, 224),
        ("efficientformer_l1", 224, 224),
        ("sola_nano", 64, 96),
    ]
    assert len(said) == 1
    assert said[0].startswith("skipped: efficientformer_l1 does not take 64x96 images")
    assert said[0].count("\n") == 0
    with pytest.raises(ValueError, match="none of these networks"):
        plan(["efficientformer_l1"], [(64, 64)])


def test_every_condition_is_a_case_with_the_macs_of_its_size():
    cases = plan(
        ["sola_nano"], [(32, 64)], batch=3, dtypes=("float32", "bfloat16"), layouts=network.LAYOUTS, compiled=True
    )
    assert len(cases) == 2 * 2 * 2
    expected = count(build("sola_nano", (32, 64)), (32, 64)).gmacs
    assert set(cases.values()) == {expected}
    assert {case.batch for case in cases} == {3}


def test_ratios_are_of_one_layout_and_of_the_fastest_ones():
    mine, last = (Case("mine", 8, 8, 2, layout=layout) for layout in network.LAYOUTS)
    theirs, theirs_last = (Case("theirs", 8, 8, 2, layout=layout) for layout in network.LAYOUTS)
    elsewhere = Case("theirs", 8, 8, 2, dtype="bfloat16")
    times = {mine: 4.0, last: 2.0, theirs: 3.0, theirs_last: 6.0, elsewhere: 99.0}
    gmacs = {case: 1.0 if case.model == "mine" else 4.0 for case in times}
    rows = compare({case: Times((seconds,)) for case, seconds in times.items()}, gmacs, ["theirs"])
    assert {(row["model"], row["baseline"], row["dtype"]) for row in rows} == {("mine", "theirs", "float32")}
    assert {row["layout"]: (row["images_per_second"], row["gmacs_per_second"]) for row in rows} == {
        "contiguous": (0.75, 0.75 / 4),
        "channels_last": (3.0, 3.0 / 4),
        "fastest": (1.5, 1.5 / 4),
    }
    (row,) = compare({case: Times((times[case],)) for case in (mine, theirs)}, gmacs, ["theirs"])
    assert row["layout"] == "contiguous"


def test_rows_and_picture(tmp_path):
    cases = plan(["sola_nano", "resnet18"], [(32, 32), (32, 64)], batch=2, dtypes=("float32", "autocast"))
    result = network.measure(cases, ["resnet18"], Protocol(rounds=2, calls=1), with_memory=False)
    result = json.loads(json.dumps(result))
    assert len(result["rows"]) == 8
    assert len(result["ratios"]) == 4
    for row in result["rows"]:
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"])
        assert row["gmacs_per_second"] == pytest.approx(row["gmacs"] * row["images_per_second"])
        assert len(row["rounds"]) == 2
    draw(result["rows"], tmp_path / "p.png")
    assert Image.open(tmp_path / "p.png").size[0] > 600


@pytest.mark.parametrize("dtype", network.DTYPES)
def test_a_training_step_changes_the_weights_and_leaves_no_gradient(dtype):
    case = Case("sola_nano", 32, 32, 2, dtype=dtype, training=True)
    model = network.network(case)
    step = network.job(model, case)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for _ in range(20 if dtype == "bfloat16" else 1):  # steps of 1e-5 vanish in bfloat16 where weights are large
        step()
    changed = [name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])]
    assert len(changed) > 0.5 * len(before)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize(("dtype", "weights"), [("bfloat16", torch.bfloat16), ("autocast", torch.float32)])
def test_dtypes_of_weights_and_results(dtype, weights):
    case = Case("resnet18", 32, 32, 1, dtype=dtype, layout="channels_last")
    model = network.network(case)
    assert not model.training
    assert model.conv1.weight.dtype == weights
    assert model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert network.job(model, case)().dtype == torch.bfloat16


def test_drop_path_is_off_on_both_sides():
    for name in ("sola_tiny", "swin_tiny_patch4_window7_224"):
        model = network.network(Case(name, 224, 224, 1, training=True))
        rates = {m.drop_prob for m in model.modules() if type(m).__name__ == "DropPath"}
        assert rates <= {0.0}


def test_memory_is_that_of_another_process():
    """What this process holds does not count, and a batch of larger images adds what it must."""
    ballast = torch.zeros(2**27)  # 512 MiB
    small, large = (network.memory_of(Case("sola_nano", side, side, 4)) for side in (32, 256))
    assert ballast.sum() == 0
    assert 1.65 * 4 < small["added_mib"] < 300  # at least the weights
    assert large["added_mib"] > small["added_mib"] + 20
    assert small["peak_mib"] > small["added_mib"]


def test_memory_that_cannot_be_measured_is_none(capsys):
    assert network.memory_of(Case("no_such_network", 32, 32, 1)) == {"peak_mib": None, "added_mib": None}
    assert "memory of no_such_network at 32x32, float32 could not be measured" in capsys.readouterr().err
