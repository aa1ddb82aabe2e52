# SPDX-License-Identifier: Apache-2.0
"""Vision-RWKV's operator compared with a token-by-token version of its published kernels and with eq. 9."""

import pytest
import torch
from naive_vrwkv import kernel
from torch import nn
from torch.autograd import gradcheck

from sola_vision.ops import published_wkv, wkv


def inputs(tokens, decay=(-8.0, 8.0), batch=2, channels=8, spread=3.0, seed=0):
    torch.manual_seed(seed)
    key, value = spread * torch.randn(batch, tokens, channels), torch.randn(batch, tokens, channels)
    return torch.linspace(*decay, channels), torch.linspace(-3, 3, channels), key, value


@pytest.mark.parametrize("tokens", [1, 2, 5, 31, 32, 33, 49, 64, 65, 196, 197])
def test_published_wkv_equals_the_kernels_formula(tokens):
    decay, bonus, key, value = inputs(tokens)
    out = published_wkv(decay, bonus, key.double(), value.double())
    assert (out - kernel(decay, bonus, key, value)).abs().max() < 1e-12


def test_invalid_arguments_raise():
    decay, bonus, key, value = inputs(5)
    with pytest.raises(ValueError, match=r"published_wkv: decay \[1\] and bonus \[8\] must both be \[C\] = \[8\]"):
        published_wkv(decay[:1], bonus, key, value)
    with pytest.raises(ValueError, match="same shape"):
        published_wkv(decay, bonus, key, value[:, :4])
    with pytest.raises(TypeError, match="int64"):
        published_wkv(decay, bonus, key.long(), value)
    assert published_wkv(decay, bonus, key[:, :0], value[:, :0]).shape == (2, 0, 8)


@pytest.mark.parametrize("decay", [(-30.0, -10.0), (10.0, 30.0), (50.0, 100.0)])
def test_published_wkv_where_the_formula_is_not_a_mean(decay):
    decay, bonus, key, value = inputs(196, decay)
    expected = kernel(decay, bonus, key, value)
    # the kernels subtract what they have added: even in float64 they lose digits by cancellation
    assert (
        published_wkv(decay, bonus, key.double(), value.double()) - expected
    ).abs().max() < 1e-8 * expected.abs().max()


def test_the_added_constant_is_included():
    # one token dominates: the sum of weights is 1 relative to the largest exponent, so that 1e-6 is noticeable
    decay, bonus, key, value = inputs(64)
    key[:, 40] = 50
    exact = kernel(decay, bonus, key, value)
    assert (published_wkv(decay, bonus, key.double(), value.double()) - exact).abs().max() < 1e-12
    assert (kernel(decay, bonus, key, value, eps=0.0) - exact).abs().max() > 5e-7


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-9)])
def test_published_wkv_in_every_precision(dtype, error):
    decay, bonus, key, value = inputs(77)
    key, value = key.to(dtype), value.to(dtype)
    out = published_wkv(decay, bonus, key, value)
    assert out.dtype == dtype
    assert (out.double() - kernel(decay, bonus, key, value)).abs().max() < error * value.abs().max()


def test_published_wkv_gradcheck():
    decay, bonus, key, value = (x.double().requires_grad_() for x in inputs(37, channels=2, batch=1, spread=1.0))
    assert gradcheck(published_wkv, (decay, bonus, key, value), atol=2e-6)


class Read(nn.Module):
    def forward(self, decay, bonus, key, value):
        return published_wkv(decay, bonus, key, value)


def test_exporting_published_wkv_raises():
    with pytest.raises(Exception, match="eq9=True"):
        torch.export.export(Read(), inputs(5))


def test_the_difference_from_eq9_shrinks_with_more_tokens():
    # Vision-RWKV's initial decays and bonus, the latter divided by N on both sides: the numbers of docs/weights.md
    decay, bonus = torch.linspace(-5, 3, 64), torch.full((64,), 0.3).log()
    differences = []
    for tokens in (49, 196, 784):
        _, _, key, value = inputs(tokens, channels=64, spread=1.0)
        key, value = key.double(), value.double()
        eq9 = wkv(decay, bonus / tokens, key, value)
        differences.append(float((published_wkv(decay, bonus, key, value) - eq9).abs().max() / eq9.std()))
    assert differences == pytest.approx([5.4e-2, 1.1e-2, 1.6e-3], rel=0.1)
