# SPDX-License-Identifier: Apache-2.0
"""Rows of the operator's benchmark, the targets that apply to a shape, and detection of errors."""

import json

import pytest
import torch

from sola_vision import ops
from sola_vision.bench import accuracy, operator
from sola_vision.bench.operator import Name, compare
from sola_vision.bench.rounds import Protocol, Times
from sola_vision.ops import reference

needs_kernel = pytest.mark.skipif(ops.missing_kernel("cpu") is not None, reason=str(ops.missing_kernel("cpu")))


def taken(**seconds):
    names = {
        "forward": Name("native", "forward"),
        "streamed": Name("native", "forward", "streamed"),
        "backward": Name("native", "backward"),
        "both": Name("native", "both"),
        "copy": Name("copy", "forward"),
        "copy_streamed": Name("copy", "forward", "streamed"),
        "attention": Name("attention", "forward"),
        "attention_both": Name("attention", "both"),
    }
    return {names[name]: Times((value,)) for name, value in seconds.items()}


def found(ratios):
    return {r.what: (r.value, r.target, r.met) for r in ratios}


def test_targets_apply_where_the_project_set_them():
    times = taken(
        forward=3, streamed=3, backward=7, both=10, copy=1, copy_streamed=1, attention=360, attention_both=999
    )
    shape = (1, 3136, 96)
    in_cache = found(compare(times, shape, "float32", in_cache=True))
    assert in_cache == {
        "forward over a copy, repeated": (3, 4.0, True),
        "forward over a copy, streamed": (3, None, None),
        "backward over forward": (pytest.approx(7 / 3), 2.2, False),
        "attention over forward": (120, 120.0, True),
        "attention over both": (99.9, 100.0, False),
    }
    streaming = found(compare(times, (8, 3136, 96), "float32", in_cache=False))
    assert streaming["forward over a copy, repeated"] == (3, None, None)
    assert streaming["forward over a copy, streamed"] == (3, 2.5, False)
    # attention's targets are for one number of tokens, in float32
    assert found(compare(times, (1, 784, 192), "float32", in_cache=True))["attention over forward"][1:] == (None, None)
    assert found(compare(times, shape, "bfloat16", in_cache=True))["attention over both"][1:] == (None, None)


def test_rows_and_ratios_of_a_run():
    said = []
    result = operator.measure(((2, 20, 32),), (torch.float32, torch.bfloat16), Protocol(rounds=2, calls=1), said.append)
    result = json.loads(json.dumps(result))
    jobs = {(row["dtype"], row["path"], row["direction"], row["data"]) for row in result["rows"]}
    assert ("float32", "portable", "both", "repeated") in jobs
    assert ("float32", "attention", "both", "repeated") in jobs
    assert ("bfloat16", "attention", "both", "repeated") not in jobs
    assert ("bfloat16", "copy", "forward", "streamed") in jobs
    for row in result["rows"]:
        assert row["shape"] == [2, 20, 32]
        assert len(row["rounds"]) == 2
        assert min(row["rounds"]) <= row["microseconds"] <= max(row["rounds"])
    if ops.missing_kernel("cpu") is None:
        assert {r["what"] for r in result["ratios"]} >= {"forward over a copy, repeated", "portable over both"}
    else:
        assert any("native skipped" in line for line in said)


def test_without_a_kernel_the_rest_is_measured(monkeypatch):
    monkeypatch.setattr(ops, "missing_kernel", lambda device: "the CPU kernel was not built")
    said = []
    result = operator.measure(((1, 4, 8),), (torch.float32,), Protocol(rounds=1, calls=1), said.append)
    assert said[0] == "native skipped: the CPU kernel was not built"
    assert {row["path"] for row in result["rows"]} == {"portable", "copy"}
    assert result["ratios"] == []


def test_streamed_calls_walk_through_more_than_the_caches():
    key = torch.zeros(1, 64, 64)
    ring = operator._ring(key, key)
    pointers = {pair[0].data_ptr() for pair, _ in zip(ring, range(100), strict=False)}
    assert len(pointers) == 100


def test_the_definition_in_pieces_is_the_definition(monkeypatch):
    monkeypatch.setattr(accuracy, "_AT_ONCE", 2 * 23 * 3 * 5)  # five rows at a time
    inputs = accuracy.operands((2, 23, 3), "trained network")
    out, gradients = accuracy.definition(inputs)
    leaves = [x.double().requires_grad_() for x in inputs[:4]]
    whole = reference.wkv(*leaves)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(gradients, torch.autograd.grad(whole, leaves, inputs[4].double()))


@pytest.mark.parametrize("wrong", ["y", "w", "u", "k", "v"])
def test_an_error_shows_where_it_is(wrong):
    inputs = accuracy.operands((1, 30, 4), "trained network")
    out, gradients = truth = accuracy.definition(inputs)
    off = {name: x.clone() for name, x in zip("ywukv", (out, *gradients), strict=True)}
    off[wrong].view(-1)[3] += 1e-3 * off[wrong].abs().max()
    forward, errors = accuracy.errors((off["y"], tuple(off[x] for x in "wukv")), truth, inputs)
    errors["y"] = forward
    assert errors.pop(wrong) > 3e-4
    assert max(errors.values()) == 0.0
    off[wrong].view(-1)[3] = float("nan")
    forward, errors = accuracy.errors((off["y"], tuple(off[x] for x in "wukv")), truth, inputs)
    assert (errors | {"y": forward})[wrong] == float("inf")


def test_accuracy_of_the_paths():
    said = []
    result = json.loads(json.dumps(accuracy.measure(((1, 40, 5),), ("reference", "portable", "mmx"), said.append)))
    assert len(result["rows"]) == 2 * len(accuracy.RANGES)
    assert all(row["met"] and row["referee"] == "definition" for row in result["rows"])
    assert any(line.startswith("mmx skipped") for line in said)


@needs_kernel
def test_the_instruction_set_is_put_back():
    from sola_vision.ops import cpu

    before = cpu.instruction_set()
    result = accuracy.measure(((1, 40, 5),), ("generic",))
    assert all(row["path"] == "generic" and row["met"] for row in result["rows"])
    assert cpu.instruction_set() == before
