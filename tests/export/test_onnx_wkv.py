# SPDX-License-Identifier: Apache-2.0
"""Eq. 9 in standard operators, in onnxruntime, against the definition in float64; and its cost."""

import numpy as np
import pytest
import torch

import sola_vision

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxscript")

from sola_vision.export import wkv  # noqa: E402 - after the skips


def build(channels, dtype="FLOAT", all_values=False):
    """A graph of nothing but the operator, as a session."""
    kind = ir.TensorType(ir.DataType[dtype])
    names = {"decay": [channels], "bonus": [channels], "key": ["B", "N", channels], "value": ["B", "N", channels]}
    inputs = [ir.Value(name=name, shape=ir.Shape(shape), type=kind) for name, shape in names.items()]
    node = ir.Node("sola", "wkv", inputs, num_outputs=1)
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", kind, inputs[2].shape
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 20, "sola": 1}, name="wkv")
    model = ir.Model(graph, ir_version=10)
    wkv.expand(model, "sola")
    proto = ir.to_proto(model)
    assert {node.domain for node in proto.graph.node} == {""}
    if all_values:
        known = {value.name for value in proto.graph.output}
        rest = [name for node in proto.graph.node for name in node.output if name not in known]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in rest)
    return ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


def draw(batch, tokens, channels, low=-20.0, high=200.0, keys=5.0):
    generator = torch.Generator().manual_seed(tokens)
    decay = torch.rand(channels, generator=generator) * (high - low) + low
    bonus = torch.randn(channels, generator=generator) * 2
    key = torch.randn(batch, tokens, channels, generator=generator) * keys
    return decay, bonus, key, torch.randn(batch, tokens, channels, generator=generator)


def run(session, inputs, half=False):
    kinds = np.float16 if half else np.float32
    names = ("decay", "bonus", "key", "value")
    return session.run(["y"], {n: x.numpy().astype(kinds) for n, x in zip(names, inputs, strict=True)})[0]


def definition(inputs):
    with sola_vision.ops.use("portable" if inputs[2].shape[1] > 600 else "reference"):
        return sola_vision.wkv(*(x.double() for x in inputs)).numpy()


@pytest.fixture(scope="module")
def session():
    return build(6)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 49, 255, 256, 257, 1000, 4097, 9000])
def test_any_length(session, tokens):
    inputs = draw(2, tokens, 6)
    assert np.abs(run(session, inputs) - definition(inputs)).max() < 5e-6


@pytest.mark.parametrize("decay", [-24.0, -3.0, 0.0, 64.0, 1e4, 1e9])
@pytest.mark.parametrize("tokens", [2, 40, 300])
def test_any_decay(session, tokens, decay):
    inputs = draw(1, tokens, 6, decay, decay)
    assert np.abs(run(session, inputs) - definition(inputs)).max() < 5e-6


def test_keys_far_below_the_largest_stay_between_the_values(session):
    # sixty below the largest key weights are flattened: not eq. 9 any more, but still a mean of the values
    decay, bonus, key, value = draw(3, 500, 6, 0.0, 200.0, keys=200.0)
    y = run(session, (decay, bonus, key, value))
    assert np.isfinite(y).all()
    assert (y <= value.amax(1, keepdim=True).numpy() + 1e-5).all()
    assert (y >= value.amin(1, keepdim=True).numpy() - 1e-5).all()
    inside = draw(3, 500, 6, 0.0, 200.0, keys=5.0)
    # a shift of all keys changes nothing
    shifted = (inside[0], inside[1], inside[2] + 300.0, inside[3])
    assert np.abs(run(session, shifted) - definition(shifted)).max() < 2e-4  # float32 holds 300.x to 3e-5


def test_extreme_decay_is_finite(session):
    for low in (-1e3, -1e30):
        inputs = draw(2, 100, 6, low, low)
        assert np.isfinite(run(session, inputs)).all()


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("bonus", [-120.0, 89.0, 1000.0])
def test_extreme_bonus_is_the_definition(session, bonus, tokens):
    decay, _, key, value = draw(1, tokens, 6, keys=1.0)
    inputs = decay, torch.full((6,), bonus), key, value
    np.testing.assert_allclose(run(session, inputs), definition(inputs), atol=1e-5)


def test_half_precision_computes_in_float32():
    session = build(6, "FLOAT16")
    inputs = tuple(x.half().float() for x in draw(2, 700, 6, 0.0, 60.0))
    y = run(session, inputs, half=True)
    assert y.dtype == np.float16
    assert np.abs(y - definition(inputs)).max() < 4e-3  # values up to 4 in half precision


def test_no_tensor_grows_faster_than_the_tokens():
    session = build(2, all_values=True)
    largest = {}
    for tokens in (8192, 32768):
        inputs = dict(zip(("decay", "bonus", "key", "value"), draw(1, tokens, 2), strict=True))
        results = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        largest[tokens] = max(x.size for x in results)
        assert largest[tokens] <= 2.5 * 2 * tokens  # numerator and denominator side by side
    assert largest[32768] == 4 * largest[8192]
