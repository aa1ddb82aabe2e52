# SPDX-License-Identifier: Apache-2.0
"""Layers against their formulas."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from sola_vision import ops
from sola_vision.layers import (
    HiddenStateBridge,
    LinearLayer,
    PatchMerging,
    SoftmaxLayer,
    SoftmaxMixer,
    Stem,
    bands,
    dispatch,
    projections,
)
from sola_vision.layers.bridge import sample
from sola_vision.layers.projections import gate_linear
from sola_vision.ops import cpu, reference


def token_shift(x, *mixes):
    return tuple(mix * x + (1 - mix) * ops.quad_shift(x) for mix in mixes)


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


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("budget", [1, 7_000, 30_000])  # a row, some rows, some images
def test_bands_change_nothing(monkeypatch, shift, budget):
    torch.manual_seed(0)
    layer = LinearLayer(12, token_shift=shift)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(3, 9, 7, 12)
    expected, readout = layer(x)
    monkeypatch.setattr(bands, "BAND_BYTES", budget)
    monkeypatch.setattr(cpu, "multiplies", lambda dtype: False)  # whose tiles come first
    with torch.no_grad():
        out, same = layer(x)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(same, readout)
        out, _ = layer(x.transpose(1, 2).contiguous().transpose(1, 2))
        torch.testing.assert_close(out, expected)


@pytest.fixture
def small_tiles(monkeypatch):
    """The kernel's products, of however few tokens, where there is one."""
    monkeypatch.setattr(dispatch, "_tokens_per_square", lambda dtype: 0)


@pytest.fixture
def tiles(small_tiles):
    """The same for certain; a list that grows with the names of those that run."""
    if not cpu.multiplies(torch.float32):
        pytest.skip("there is no kernel that multiplies in tiles")
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function._opname)
            return function(*args, **(kwargs or {}))

    with Watch():
        yield seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [True, False])
def test_tiles_change_nothing(tiles, shift, dtype):
    if not cpu.multiplies(dtype):
        pytest.skip(f"no kernel multiplies {dtype}")
    torch.manual_seed(0)
    layer = LinearLayer(40, token_shift=shift)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    layer, x = layer.to(dtype), torch.randn(3, 9, 7, 40).to(dtype)
    with torch.no_grad():
        found = layer(x)
        assert ("channel_mix" in tiles) == shift
        turned, _ = layer(x.transpose(1, 2).contiguous().transpose(1, 2))
        with ops.use("portable"):
            expected = layer(x)
    close = {"rtol": 0, "atol": 0.1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(found, expected, **close)
    assert torch.equal(turned, found[0])


def test_gradients_in_tiles_are_those_of_the_plain_form(tiles):
    torch.manual_seed(0)
    layer, x = LinearLayer(40), torch.randn(2, 9, 7, 40, requires_grad=True)
    tensors, weight = [x, *layer.parameters()], torch.randn(2, 9, 7, 40)
    found = torch.autograd.grad((layer(x)[0] * weight).sum(), tensors)
    assert {"norm_shift_linear_backward", "gate_linear_backward", "squared_relu_linear_backward"} <= set(tiles)
    with ops.use("portable"):
        expected = torch.autograd.grad((layer(x)[0] * weight).sum(), tensors)
    for each in zip(found, expected, strict=True):
        torch.testing.assert_close(*each, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(2, 0, 4, 8), (2, 4, 0, 8), (0, 4, 4, 8)])
def test_images_without_pixels_in_inference_too(size):
    layer = LinearLayer(8).eval()
    with torch.no_grad():
        assert layer(torch.empty(size))[0].shape == size


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_layer_refuses_tokens_of_another_dtype_in_training_too(dtype):
    layer, x = LinearLayer(8), torch.randn(1, 4, 4, 8, dtype=dtype)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="dtype"):
            layer(x)


@pytest.mark.parametrize("autocast", [True, False])
def test_a_gate_of_two_dtypes_has_gradients(autocast):
    receptance = torch.randn(1, 2, 3, 8, dtype=torch.bfloat16, requires_grad=True)
    value, projection = torch.randn(1, 2, 3, 8, requires_grad=True), torch.nn.Linear(8, 8, bias=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        gate_linear(receptance, value, projection).sum().backward()
    wide = receptance.detach().float().requires_grad_()
    other = value.detach().clone().requires_grad_()
    gate_linear(wide, other, projection).sum().backward()
    torch.testing.assert_close(value.grad, other.grad, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(receptance.grad.float(), wide.grad, rtol=2e-2, atol=2e-2)


def test_autocast_does_not_multiply_in_tiles(tiles):
    layer, x = LinearLayer(8), torch.randn(1, 9, 7, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = layer(x)
    out.sum().backward()  # outside of autocast, with gradients in half precision
    assert not any("linear" in name for name in tiles)


def test_a_hooked_mixer_is_called(tiles):
    layer, x, seen = LinearLayer(8), torch.randn(1, 9, 7, 8), []
    with torch.no_grad():
        expected, _ = layer(x)
        layer.mixer.register_forward_hook(lambda module, inputs, out: seen.append(out[0].shape))
        found, _ = layer(x)
    assert seen == [x.shape]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("height", [1, 2, 9])
def test_bands_cover_an_image_once_with_their_neighbours(monkeypatch, height):
    monkeypatch.setattr(bands, "BAND_BYTES", 2 * 5 * 3 * 4)
    x = torch.arange(2 * height).view(2, height, 1, 1).expand(2, height, 5, 3).float()
    found = list(bands.bands(x, 3))
    assert torch.cat([band.of(x).flatten(0, 1) for band in found]).equal(x.flatten(0, 1))
    for band in found:
        near = band.with_neighbours(x)[0, :, 0, 0]
        first = band.rows.start + height * band.images.start
        assert near[0] == first - (band.rows.start > 0)
        assert near.numel() == band.of(x).shape[1] + band.top + band.bottom
        assert (band.top, band.bottom) == (int(band.rows.start > 0), int(band.rows.stop < height))


@pytest.mark.parametrize("budget", [1, 1 << 30])  # an image at a time, all of them
@pytest.mark.parametrize("shift", [True, False])
def test_gradients_are_those_of_the_plain_form(monkeypatch, shift, budget):
    monkeypatch.setattr(projections, "BAND_BYTES", budget)
    torch.manual_seed(0)
    layer = LinearLayer(12, token_shift=shift).double()
    x = torch.randn(2, 3, 5, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    tensors = [x, *layer.parameters()]
    fused = torch.autograd.grad((layer(x)[0] * weight).sum(), tensors)
    with ops.use("portable"):
        plain = torch.autograd.grad((layer(x)[0] * weight).sum(), tensors)
    torch.testing.assert_close(fused, plain)


class Adapted(torch.nn.Module):
    """As a low-rank adapter shows itself: the base layer's weight, and more in the forward."""

    def __init__(self, base):
        super().__init__()
        self.base, self.out_features, self.bias = base, base.out_features, None

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        return self.base(x) + x.mean(-1, keepdim=True)


@pytest.mark.parametrize("name", ["mixer.receptance", "mixer.output", "channel_mix.key", "channel_mix.value"])
def test_changed_projections_are_called(name):
    """What is more than its weight must not be taken for it, whichever path runs."""
    torch.manual_seed(0)
    layer, x = LinearLayer(12), torch.randn(2, 9, 7, 12)
    original = layer(x)[0]
    layer.set_submodule(name, Adapted(layer.get_submodule(name)))
    with ops.use("portable"):
        expected = layer(x)[0]
    assert not torch.allclose(original, expected)
    torch.testing.assert_close(layer(x)[0], expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], expected)


@pytest.mark.parametrize("grad", [True, False])
def test_hooks_see_whole_maps(grad):
    layer, x, seen = LinearLayer(12), torch.randn(2, 9, 7, 12), []
    for name in ("mixer.key", "mixer.output", "channel_mix.key", "channel_mix.value"):
        layer.get_submodule(name).register_forward_hook(lambda m, i, out: seen.append(out.shape))
    with torch.set_grad_enabled(grad):
        layer(x)
    assert seen == [(2, 9, 7, 12), (2, 9, 7, 12), (2, 9, 7, 48), (2, 9, 7, 12)]


def test_a_linear_layer_keeps_little_for_the_backward():
    """Thirteen maps of the input's size, and no more: inputs, products and the hidden units, none of the passes."""
    layer = LinearLayer(16)
    x = torch.randn(2, 8, 8, 16, requires_grad=True)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        layer(x)
    weights = {p.data_ptr() for p in layer.parameters()}
    maps = sum(t.numel() for at, t in kept.items() if at not in weights and t.ndim > 2) / x.numel()
    assert maps <= 13


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_leaves_a_float64_layer_alone(trained):
    layer = LinearLayer(8).double()
    x = torch.randn(1, 3, 4, 8, dtype=torch.float64)
    with torch.set_grad_enabled(trained):
        expected, _ = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = layer(x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("trained", [False, True])
def test_autocast_does_not_hide_tokens_of_another_dtype(trained):
    layer, x = LinearLayer(8), torch.randn(1, 3, 4, 8, dtype=torch.float64)
    with (
        torch.set_grad_enabled(trained),
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises((RuntimeError, ValueError)),
    ):
        layer(x)


@pytest.mark.parametrize("kind", [LinearLayer, SoftmaxLayer])
def test_many_gradients_come_as_one(kind):
    """torch's own batches of gradients divide none but torch's own operators."""
    torch.manual_seed(0)
    layer, x = kind(32), torch.randn(2, 3, 4, 32)
    rows = [
        torch.autograd.functional.jacobian(lambda x: layer(x)[0].sum((1, 2))[:, :3], x, vectorize=vectorize)
        for vectorize in (True, False)
    ]
    torch.testing.assert_close(*rows)


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


@pytest.mark.parametrize("shift", [True, False])
def test_gradients_of_each_image_by_torch_func(shift):
    torch.manual_seed(0)
    layer = LinearLayer(8, token_shift=shift)
    images = torch.randn(3, 1, 4, 5, 8)
    parameters = dict(layer.named_parameters())

    def loss(parameters, image):
        out, _ = torch.func.functional_call(layer, parameters, (image,))
        return out.square().mean()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    for i, image in enumerate(images):
        singly = torch.autograd.grad(loss(parameters, image), list(parameters.values()))
        for name, gradient in zip(parameters, singly, strict=True):
            torch.testing.assert_close(together[name][i], gradient, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(layer)(images)[0], torch.stack([layer(x)[0] for x in images]))


class Wrapped(torch.nn.Module):
    """As checkpointing, compilers and sharding wrap a part of a network."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, *args):
        self.calls += 1
        return self.inner(*args)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", ["mixer", "channel_mix"])
def test_what_wraps_or_replaces_a_part_is_called(name, grad):
    torch.manual_seed(0)
    layer, x = LinearLayer(12), torch.randn(2, 9, 7, 12)
    expected, _ = layer(x)
    part = getattr(layer, name)
    setattr(layer, name, Wrapped(part))
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer(x)[0], expected)
    assert getattr(layer, name).calls == 1

    class Other(type(part)):
        def forward(self, x):
            made = super().forward(x)
            return made * 2 if name == "channel_mix" else (made[0] * 2, made[1])

    part.__class__ = Other
    setattr(layer, name, part)
    with torch.set_grad_enabled(grad):
        assert not torch.allclose(layer(x)[0], expected)


@pytest.mark.parametrize(
    "name", ["mixer.receptance.weight", "mixer.mix_key", "norm1.weight", "channel_mix.value.weight"]
)
def test_tangents_of_parameters_reach_the_result(name):
    layer, x = LinearLayer(12), torch.randn(2, 9, 7, 12)
    values = dict(layer.named_parameters())
    with torch.no_grad(), forward_ad.dual_level():
        values[name] = forward_ad.make_dual(values[name].detach(), torch.ones_like(values[name]))
        out, _ = torch.func.functional_call(layer, values, (x,))
        assert forward_ad.unpack_dual(out).tangent.abs().sum() > 0


class Halved(torch.nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) / 2


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize(
    "replacement",
    [Halved(12), torch.nn.RMSNorm(12), torch.nn.Identity(), torch.nn.LayerNorm(12, elementwise_affine=False),
     torch.nn.LayerNorm(12, bias=False)],
    ids=lambda norm: type(norm).__name__,
)  # fmt: skip
def test_another_norm_is_called(small_tiles, replacement, shift, grad):
    torch.manual_seed(0)
    layer, x = LinearLayer(12, token_shift=shift), torch.randn(2, 9, 7, 12)
    layer.norm1, layer.norm2, seen = replacement, replacement, []
    handle = replacement.register_forward_hook(lambda *_: seen.append(1))
    with torch.set_grad_enabled(grad):
        hooked, _ = layer(x)
        handle.remove()
        found, readout = layer(x)
    assert len(seen) == 2
    torch.testing.assert_close(hooked, found)

    n, m, c = replacement(x), layer.mixer, layer.channel_mix
    r, k, v = token_shift(n, m.mix_receptance, m.mix_key, m.mix_value) if shift else (n, n, n)
    torch.testing.assert_close(m.read(m.key(k), m.value(v)), readout)
    y = x + m.output(torch.sigmoid(m.receptance(r)) * readout)
    n = replacement(y)
    k, r = token_shift(n, c.mix_key, c.mix_receptance) if shift else (n, n)
    torch.testing.assert_close(found, y + torch.sigmoid(c.receptance(r)) * c.value(torch.relu(c.key(k)) ** 2))


@pytest.mark.parametrize("grad", [True, False])
def test_a_hook_on_a_norm_changes_the_result(small_tiles, grad):
    layer, x = LinearLayer(12), torch.randn(2, 9, 7, 12)
    layer.norm1.register_forward_hook(lambda module, inputs, out: out * 0)
    with torch.set_grad_enabled(grad):
        _, readout = layer(x)
    assert readout.abs().max() == 0


@pytest.mark.parametrize("grad", [True, False])
def test_a_global_hook_sees_all_parts(grad):
    layer, x, seen = LinearLayer(12), torch.randn(2, 9, 7, 12), []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, out: seen.append(module))
    with torch.set_grad_enabled(grad):
        layer(x)
    hook.remove()
    parts = {layer.mixer, layer.channel_mix, layer.drop_path}
    wanted = parts if grad else set(layer.modules())  # in training, hooks that count must not change its memory
    assert wanted <= set(seen)


@pytest.mark.parametrize("height", [1, 2, 3])
def test_merging_a_column_in_bfloat16_has_the_gradients_of_float32(height):
    """torch's own has memory that nobody has written among them."""
    merge = PatchMerging(96, 128)
    x = torch.randn(8, height, 1, 96)
    whole = torch.autograd.grad(merge(x).square().sum() + merge(x)[..., :64].sum(), merge.reduction.weight)[0]
    for _ in range(5):
        # what a gradient would find in memory that was used before
        used = [torch.full((count,), 1e20) for count in (96 * 128 * 3, 96 * 128 * 9, 96 * 128 * 18) for _ in range(4)]
        del used
        with torch.autocast("cpu", torch.bfloat16):
            out = merge(x)
        (found,) = torch.autograd.grad(out.square().sum() + out[..., :64].sum(), merge.reduction.weight)
        assert (found - whole).abs().max() <= 0.05 * whole.abs().max()


def test_drop_path_is_called_wherever_it_does_something_or_is_watched():
    layer, x, seen = LinearLayer(12, drop_path=0.9), torch.randn(8, 3, 3, 12), []
    whole, _ = layer.eval()(x)
    layer.drop_path.train()  # alone: as for samples of the networks that paths make
    assert not torch.equal(layer(x)[0], whole)
    layer.drop_path = torch.nn.Identity()  # timm's word for none
    torch.testing.assert_close(layer.train()(x)[0], whole)
    layer.drop_path.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(layer(x)[0], whole)
    assert len(seen) == 2


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", [name for name, _ in LinearLayer(12).named_parameters()])
def test_a_parameter_that_was_never_loaded_is_refused(small_tiles, name, grad):
    """The dispatcher takes a tensor on meta for all of them; a made-up result must not come of it."""
    layer = LinearLayer(12)
    owner, _, last = name.rpartition(".")
    module = layer.get_submodule(owner)
    if isinstance(module, torch.nn.Linear) and not cpu.multiplies(torch.float32):
        pytest.skip("torch's own product with a weight on meta is made up, and on the CPU")
    setattr(module, last, torch.nn.Parameter(getattr(module, last).to("meta")))
    with torch.set_grad_enabled(grad), pytest.raises((ValueError, RuntimeError), match="device"):
        layer(torch.randn(2, 9, 7, 12))


def test_a_compiled_layer_multiplies_in_tiles_and_an_exported_one_does_not():
    if not cpu.multiplies(torch.float32):
        pytest.skip("there is no kernel that multiplies in tiles")
    layer, x, graphs = LinearLayer(12).eval(), torch.randn(2, 9, 7, 12), []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    with torch.no_grad():
        expected, _ = layer(x)
        found, _ = torch.compile(layer, backend=keep, fullgraph=True)(x)
        exported = torch.export.export(layer, (x,)).module()
        again, _ = exported(x)
    (compiled,) = graphs
    tiled = ("norm_shift_linear", "spatial_mix", "channel_mix")
    calls = [[str(node.target) for node in graph.graph.nodes] for graph in (compiled, exported)]
    assert all(any(f"sola.{name}" in call for call in calls[0]) for name in tiled)
    assert not any(f"sola.{name}" in call for name in tiled for call in calls[1])
    assert any("sola.norm_shift" in call for call in calls[1])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(again, expected)
