# SPDX-License-Identifier: Apache-2.0
"""Eq. 9 as matrix products: accurate within its bounds, finite beyond them, and used by torch's ONNX exporter."""

import pytest
import torch
from torch import nn

from sola_vision import ops
from sola_vision.ops import onnx_form, reference


def random_inputs(tokens, channels, spread=3.0, batch=2, decays=(-20.0, 200.0)):
    generator = torch.Generator().manual_seed(tokens)
    key, value = (torch.randn(batch, tokens, channels, generator=generator) * size for size in (spread, 1.0))
    decay = torch.empty(channels).uniform_(*decays, generator=generator)
    return decay, torch.randn(channels, generator=generator), key, value


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 49, 197, 257, 1000])
@pytest.mark.parametrize("channels", [1, 33])
def test_values_equal_eq9(tokens, channels):
    inputs = random_inputs(tokens, channels)
    truth = reference.wkv(*(x.double() for x in inputs))
    assert (onnx_form.wkv(*inputs) - truth).abs().max() < 5e-6 * inputs[3].abs().max()


def test_reversed_tokens_give_reversed_values():
    decay, bonus, key, value = random_inputs(49, 5)
    reversed_ = onnx_form.wkv(decay, bonus, key.flip(1), value.flip(1)).flip(1)
    torch.testing.assert_close(reversed_, onnx_form.wkv(decay, bonus, key, value))


def test_a_constant_added_to_all_keys_changes_nothing_and_constant_values_are_preserved():
    decay, bonus, key, value = random_inputs(197, 5)
    shifted = onnx_form.wkv(decay, bonus, key + 1000, value)
    torch.testing.assert_close(shifted, onnx_form.wkv(decay, bonus, key, value), atol=1e-3, rtol=0)
    ones = torch.ones_like(value)
    torch.testing.assert_close(onnx_form.wkv(decay, bonus, key, ones), ones)


def test_values_beyond_the_bounds_are_finite_means():
    decay, bonus, key, value = random_inputs(300, 4, spread=100.0, decays=(-500.0, 1e5))
    y = onnx_form.wkv(decay, bonus, key, value)
    assert y.isfinite().all()
    assert y.abs().max() <= value.abs().max() * (1 + 1e-5)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("bonus", [-120.0, 89.0, 1000.0])
def test_an_extreme_bonus_equals_the_definition(bonus, tokens):
    decay, _, key, value = random_inputs(tokens, 5)
    inputs = decay, torch.full((5,), bonus), key, value
    truth = reference.wkv(*(x.double() for x in inputs))
    torch.testing.assert_close(onnx_form.wkv(*inputs), truth.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_result_has_the_dtype_of_the_values(dtype):
    decay, bonus, key, value = random_inputs(20, 3)
    assert onnx_form.wkv(decay, bonus, key.to(dtype), value.to(dtype)).dtype == dtype


class Mixer(nn.Module):
    def forward(self, decay, bonus, key, value):
        return ops.gate(key, ops.wkv(decay, bonus, key, value))


def test_torch_onnx_export_writes_standard_operators(tmp_path):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    inputs = random_inputs(40, 4)
    torch.onnx.export(Mixer().eval(), inputs, tmp_path / "mixer.onnx", dynamo=True, verbose=False)
    assert {node.domain for node in onnx.load(tmp_path / "mixer.onnx").graph.node} == {""}
    session = onnxruntime.InferenceSession(tmp_path / "mixer.onnx", providers=["CPUExecutionProvider"])
    names = [argument.name for argument in session.get_inputs()]
    (y,) = session.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    torch.testing.assert_close(torch.from_numpy(y), Mixer()(*inputs))
