# SPDX-License-Identifier: Apache-2.0
"""Layers against their formulas."""

import pytest
import torch

from sola_vision.layers import HiddenStateBridge, LinearLayer, PatchMerging, SoftmaxMixer, Stem, quad_shift, token_shift
from sola_vision.layers.bridge import sample
from sola_vision.ops import reference


def test_quad_shift_moves_each_quarter_one_pixel():
    x = torch.arange(2 * 3 * 4 * 9, dtype=torch.float32).reshape(2, 3, 4, 9) + 1
    out = quad_shift(x)
    torch.testing.assert_close(out[:, :, 1:, 0:2], x[:, :, :-1, 0:2])  # from the left
    torch.testing.assert_close(out[:, :, :-1, 2:4], x[:, :, 1:, 2:4])  # from the right
    torch.testing.assert_close(out[:, 1:, :, 4:6], x[:, :-1, :, 4:6])  # from above
    torch.testing.assert_close(out[:, :-1, :, 6:8], x[:, 1:, :, 6:8])  # from below
    torch.testing.assert_close(out[..., 8], x[..., 8])
    outside = (out[:, :, 0, 0:2], out[:, :, -1, 2:4], out[:, 0, :, 4:6], out[:, -1, :, 6:8])
    assert all((edge == 0).all() for edge in outside)


@pytest.mark.parametrize("channels", [1, 3, 4, 33])
def test_token_shift_blends_between_neighbour_and_token(channels):
    x = torch.randn(1, 5, 1, channels)
    mixes = torch.zeros(channels), torch.ones(channels), torch.full((channels,), 0.25)
    neighbour, token, blend = token_shift(x, *mixes)
    torch.testing.assert_close(neighbour, quad_shift(x))
    torch.testing.assert_close(token, x)
    torch.testing.assert_close(blend, 0.25 * x + 0.75 * quad_shift(x))


@pytest.mark.parametrize("shift", [True, False])
def test_linear_layer_is_the_formula(shift):
    torch.manual_seed(0)
    layer = LinearLayer(12, token_shift=shift).double()
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    out, readout = layer(x)

    n, m = layer.norm1(x), layer.mixer
    mixes = (m.mix_receptance, m.mix_key, m.mix_value) if shift else ()
    r, k, v = token_shift(n, *mixes) if shift else (n, n, n)
    k, v = m.key(k).flatten(1, 2), m.value(v).flatten(1, 2)
    state = torch.einsum("btnc,bnc->btc", reference.weights(m.decay, m.bonus, k), v).reshape(2, 3, 5, 12)
    torch.testing.assert_close(readout, state)
    y = x + m.output(torch.sigmoid(m.receptance(r)) * state)

    n, c = layer.norm2(y), layer.channel_mix
    k, r = token_shift(n, c.mix_key, c.mix_receptance) if shift else (n, n)
    torch.testing.assert_close(out, y + torch.sigmoid(c.receptance(r)) * c.value(torch.relu(c.key(k)) ** 2))


def test_softmax_mixer_is_eq_1_for_every_head():
    torch.manual_seed(0)
    mixer = SoftmaxMixer(12, head_dim=4).double()
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64)
    q, k, v = mixer.qkv(x).flatten(1, 2).split(12, dim=-1)
    heads = []
    for h in range(3):
        part = slice(4 * h, 4 * h + 4)
        attention = torch.softmax(q[..., part] @ k[..., part].mT / 2, dim=-1)
        heads.append(attention @ v[..., part])
    torch.testing.assert_close(mixer(x), mixer.output(torch.cat(heads, -1)).reshape(x.shape))


def test_sample_takes_the_token_at_the_centre():
    state = torch.arange(8 * 6).reshape(1, 8, 6, 1)
    taken = sample(state, 4, 2)[0, :, :, 0]
    assert taken.tolist() == [[state[0, r, c, 0].item() for c in (1, 4)] for r in (1, 3, 5, 7)]
    torch.testing.assert_close(sample(state, 8, 6), state)
    assert sample(state, 3, 5).shape == (1, 3, 5, 1)


def test_bridge_is_eq_10():
    torch.manual_seed(0)
    bridge = HiddenStateBridge(6, 10)
    x, state = torch.randn(2, 3, 3, 10), torch.randn(2, 12, 12, 6)
    expected = torch.sigmoid(bridge.gate(x)) * bridge.proj(sample(state, 3, 3))
    torch.testing.assert_close(bridge(x, state), expected)
    assert bridge.proj.bias is None
    assert bridge.gate.bias is None


@pytest.mark.parametrize("size", [(16, 16), (17, 30), (1, 5)])
def test_stem_pads_right_and_bottom_with_zeros(size):
    stem = Stem(3, 8)
    image = torch.randn(1, 3, *size)
    full = torch.zeros(1, 3, -(-size[0] // 4) * 4, -(-size[1] // 4) * 4)
    full[..., : size[0], : size[1]] = image
    torch.testing.assert_close(stem(image), stem(full))


def test_patch_merging_rounds_up():
    merge = PatchMerging(8, 12)
    assert merge(torch.randn(1, 5, 8, 8)).shape == (1, 3, 4, 12)
    assert merge(torch.randn(1, 1, 1, 8)).shape == (1, 1, 1, 12)
