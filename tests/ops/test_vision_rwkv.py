# SPDX-License-Identifier: Apache-2.0
"""Vision-RWKV's operator beside a token-by-token account of what its published kernels do, and beside eq. 9."""

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
def test_published_wkv_is_the_kernels_formula(tokens):
    decay, bonus, key, value = inputs(tokens)
    ours = published_wkv(decay, bonus, key.double(), value.double())
    assert (ours - kernel(decay, bonus, key, value)).abs().max() < 1e-12


def test_what_does_not_fit_together_is_refused():
    decay, bonus, key, value = inputs(5)
    with pytest.raises(ValueError, match=r"published_wkv: decay \[1\] and bonus \[8\] must both be \[C\] = \[8\]"):
        published_wkv(decay[:1], bonus, key, value)
    with pytest.raises(ValueError, match="same shape"):
        published_wkv(decay, bonus, key, value[:, :4])
    with pytest.raises(TypeError, match="int64"):
        published_wkv(decay, bonus, key.long(), value)
    assert published_wkv(decay, bonus, key[:, :0], value[:, :0]).shape == (2, 0, 8)


@pytest.mark.parametrize("decay", [(-30.0, -10.0), (10.0, 30.0), (50.0, 100.0)])
def test_published_wkv_holds_where_the_formula_is_no_mean_any_more(decay):
    decay, bonus, key, value = inputs(196, decay)
    theirs = kernel(decay, bonus, key, value)
    # the kernels subtract what they have added, so that even in float64 they lose what the sums have cancelled
    assert (published_wkv(decay, bonus, key.double(), value.double()) - theirs).abs().max() < 1e-8 * theirs.abs().max()


def test_the_added_constant_is_part_of_it():
    # a token whose weight is far above all others: the sum of weights is 1 at the largest exponent, and 1e-6 counts
    decay, bonus, key, value = inputs(64)
    key[:, 40] = 50
    exact = kernel(decay, bonus, key, value)
    assert (published_wkv(decay, bonus, key.double(), value.double()) - exact).abs().max() < 1e-12
    assert (kernel(decay, bonus, key, value, eps=0.0) - exact).abs().max() > 5e-7


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-9)])
def test_published_wkv_takes_every_precision(dtype, error):
    decay, bonus, key, value = inputs(77)
    key, value = key.to(dtype), value.to(dtype)
    ours = published_wkv(decay, bonus, key, value)
    assert ours.dtype == dtype
    assert (ours.double() - kernel(decay, bonus, key, value)).abs().max() < error * value.abs().max()


def test_published_wkv_differentiates():
    decay, bonus, key, value = (x.double().requires_grad_() for x in inputs(37, channels=2, batch=1, spread=1.0))
    assert gradcheck(published_wkv, (decay, bonus, key, value), atol=2e-6)


class Read(nn.Module):
    def forward(self, decay, bonus, key, value):
        return published_wkv(decay, bonus, key, value)


def test_published_wkv_says_that_it_is_not_exported():
    with pytest.raises(Exception, match="eq9=True"):
        torch.export.export(Read(), inputs(5))


def test_eq9_comes_nearer_with_more_tokens():
    # Vision-RWKV's first decays and bonus, the latter divided by N on both sides: the figures of docs/weights.md
    decay, bonus = torch.linspace(-5, 3, 64), torch.full((64,), 0.3).log()
    differences = []
    for tokens in (49, 196, 784):
        _, _, key, value = inputs(tokens, channels=64, spread=1.0)
        key, value = key.double(), value.double()
        eq9 = wkv(decay, bonus / tokens, key, value)
        differences.append(float((published_wkv(decay, bonus, key, value) - eq9).abs().max() / eq9.std()))
    assert differences == pytest.approx([5.4e-2, 1.1e-2, 1.6e-3], rel=0.1)
