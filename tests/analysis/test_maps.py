# SPDX-License-Identifier: Apache-2.0
"""Maps of a network: the walk equals the forward pass, weights equal the definition's, signs are defined."""

import numpy as np
import pytest
import timm
import torch

from sola_vision import SolaVision, nano
from sola_vision.analysis.explain import (
    arrays,
    effective_area,
    encode,
    explain,
    smoothness,
    tokens_a_side,
)
from sola_vision.analysis.multiscale import energy_shares, multiscale_image
from sola_vision.analysis.trace import (
    Reader,
    activation,
    attention,
    eigencam,
    feature_maps,
    keys,
    walk,
    wkv_weights,
)
from sola_vision.ops import reference


def build(**changes):
    torch.manual_seed(0)
    model = SolaVision(nano(**{"dims": (8, 16, 32, 64), "num_classes": 0, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
        for name, parameter in model.named_parameters():
            if name.endswith("decay"):
                parameter.mul_(20)  # of either sign
    return model


IMAGE = torch.randn(1, 3, 48, 80, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bridges", ["", "paper", "1.1>3.3 2.1>3.3 3.5>3.6"])
def test_the_walk_is_the_forward(bridges):
    model = build(bridges=bridges)
    with torch.no_grad():
        steps = list(walk(model, IMAGE))
        expected = model.forward_features(IMAGE)
    assert [step.name for step in steps] == [
        f"{place} {model.config.parsed_schedule.kind(place)}" for place in model.config.parsed_schedule.layers
    ]
    torch.testing.assert_close(model.norm(steps[-1].output).permute(0, 3, 1, 2), expected)
    gates = [str(bridge) for step in steps for bridge, _ in step.gates]
    assert gates == sorted(bridges.split()) if bridges != "paper" else len(gates) == 3


def test_leaving_attention_out_changes_softmax_layers_alone():
    model = build()
    with torch.no_grad():
        whole, without = (list(walk(model, IMAGE, without_softmax=skipped)) for skipped in (False, True))
        # attention with an output projection of zero equals no attention
        for stage in model.stages:
            for layer in stage.layers:
                if hasattr(layer, "mlp"):
                    layer.mixer.output.weight.zero_()
                    layer.mixer.output.bias.zero_()
        silenced = list(walk(model, IMAGE))
    torch.testing.assert_close(without[-1].output, silenced[-1].output)
    torch.testing.assert_close(without[5].output, whole[5].output)
    assert not torch.allclose(without[6].output, whole[6].output)


def test_weights_of_a_point_are_rows_of_the_definition():
    with torch.no_grad():
        for step in walk(build(), IMAGE):
            if step.kind != "L":
                continue
            height, width = step.output.shape[1:3]
            mixer = step.layer.mixer
            matrix = reference.weights(mixer.decay, mixer.bonus, keys(step))[0]  # [N, N, C]
            for token in ((0, 0), (height - 1, width // 2)):
                row = matrix[token[0] * width + token[1]].unflatten(0, (height, width))
                torch.testing.assert_close(wkv_weights(step, token)[0], row.mean(-1))
                torch.testing.assert_close(wkv_weights(step, token, [1, 5])[0], row[..., [1, 5]].permute(2, 0, 1))
                assert float(wkv_weights(step, token).sum()) == pytest.approx(1, abs=1e-12)
                # the page's single precision
                quick = Reader(step).read(token)
                torch.testing.assert_close(quick.double(), row.mean(-1), rtol=1e-4, atol=1e-7)


def test_a_reader_needs_no_gradients_and_takes_none():
    step = next(iter(walk(build(), IMAGE)))
    assert step.output.requires_grad
    read = Reader(step).read((1, 2))
    assert not read.requires_grad
    torch.testing.assert_close(read.double(), wkv_weights(step, (1, 2))[0].detach(), rtol=1e-4, atol=1e-7)


def test_readout_is_the_weights_times_the_values():
    """The state that a layer passes to bridges is the read-out by its weights."""
    with torch.no_grad():
        step = next(iter(walk(build(token_shift=False), IMAGE)))
        mixer = step.layer.mixer
        x = step.layer.norm1(step.input)
        _, readout = mixer(step.input, step.layer.norm1)
        channel = 3
        read = wkv_weights(step, (2, 4), [channel])[0, 0]
        value = mixer.value(x)[0, ..., channel].double()
    torch.testing.assert_close((read * value).sum().float(), readout[0, 2, 4, channel], rtol=1e-4, atol=1e-5)


def test_attention_of_a_point_is_torch_s():
    with torch.no_grad():
        step = next(s for s in walk(build(), IMAGE) if s.kind == "S")
        mixer = step.layer.mixer
        height, width = step.output.shape[1:3]
        qkv = mixer.qkv(step.layer.norm1(step.input)).flatten(1, 2).unflatten(-1, (3, -1, mixer.head_dim))
        query, key, _ = qkv.permute(2, 0, 3, 1, 4)
        identity = torch.eye(height * width)[None, None].expand(1, query.shape[1], -1, -1)
        expected = torch.nn.functional.scaled_dot_product_attention(query, key, identity)[0, :, 1 * width + 2]
    torch.testing.assert_close(attention(step, (1, 2))[0].flatten(1).float(), expected)


def features(seed=0, height=7, width=9, channels=5):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, channels, height, width, generator=generator)
    noise[:, :, 2:5, 3:6] += 3 * torch.randn(2, channels, 1, 1, generator=generator)
    return noise


def test_eigencam_is_the_first_component_and_follows_energy():
    feature = features()
    cam = eigencam(feature)
    for one, tokens in zip(cam, feature.double().flatten(2).transpose(1, 2), strict=True):
        centred = tokens - tokens.mean(0)
        u, s, _ = torch.linalg.svd(centred, full_matrices=False)
        torch.testing.assert_close(one.flatten().abs(), (u[:, 0] * s[0]).abs())
        assert float(((tokens**2).sum(-1) * one.flatten()).sum()) > 0
    assert float(cam[:, 2:5, 3:6].mean()) > 0


def test_eigencam_refuses_what_is_not_finite():
    with pytest.raises(ValueError, match="not finite"):
        eigencam(torch.full((1, 3, 4, 4), torch.nan))


@pytest.mark.parametrize("shape", [(7, 9, 5), (2, 3, 40)])
def test_eigencam_keeps_its_sign_under_mirror_and_rotation_of_channels(shape):
    feature = features(3, *shape[:2], channels=shape[2]) if shape[0] > 5 else torch.randn(2, shape[2], *shape[:2])
    cam = eigencam(feature)
    torch.testing.assert_close(eigencam(feature), cam, rtol=0, atol=0)
    torch.testing.assert_close(eigencam(feature.flip(-1)).flip(-1), cam, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(eigencam(-feature), cam, atol=1e-8, rtol=1e-8)


def test_eigencam_of_nothing_is_nothing():
    assert eigencam(torch.zeros(1, 4, 3, 3)).abs().max() == 0


def test_eigencam_equals_grad_cam_s_up_to_sign():
    tool = pytest.importorskip("pytorch_grad_cam", reason="pip install grad-cam to compare with its EigenCAM")
    feature = features(5)
    theirs = tool.utils.svd_on_activations.get_2d_projection(feature.numpy())
    for ours, other in zip(eigencam(feature), theirs, strict=True):
        other = torch.from_numpy(np.asarray(other)).double()
        correlation = torch.corrcoef(torch.stack([ours.flatten(), other.flatten()]))[0, 1]
        assert abs(float(correlation)) == pytest.approx(1, abs=1e-4)


def test_activation_is_the_root_of_the_mean_energy():
    feature = features()
    torch.testing.assert_close(activation(feature) ** 2, feature.double().pow(2).mean(1))


def test_explain_gives_every_layer_and_arrays_that_sum_to_one():
    views = explain(build(bridges="paper"), IMAGE[0], (10, 70), elsewhere=True)
    flat = arrays(views)
    assert len(views) == 12
    for name, values in flat.items():
        if "/wkv" in name or "/attention" in name:
            assert values.sum() == pytest.approx(1)
    assert {"3.3 S/attention", "1.1 L/wkv", "3.3 S/gate 1.2>3.3", "4.2 S/eigencam"} <= set(flat)
    assert views[0].elsewhere.shape == (144, 12, 20)
    assert set(views[0].numbers((48, 80))) >= {"read_rows", "read_area", "activation_area"}


def test_explain_takes_any_network_of_timm_s_contract():
    model = timm.create_model("convnext_atto", num_classes=0).eval()
    views = explain(model, torch.randn(3, 64, 64))
    assert [view.name for view in views] == ["map 1", "map 2", "map 3", "map 4"]
    assert views[0].reads is None
    with pytest.raises(ValueError, match="no forward_intermediates"):
        feature_maps(torch.nn.Identity(), IMAGE)


def test_a_page_knows_fewer_tokens_of_larger_images():
    assert tokens_a_side(build(), (64, 64)) == 12
    assert tokens_a_side(build(), (40_000, 40_000)) == 2


def test_encoded_maps_are_logarithms_of_times_uniform():
    uniform = torch.full((4, 6), 1 / 24)
    assert set(encode(uniform).ravel()) == {128}
    single = torch.zeros(4, 6)
    single[1, 2] = 1
    coded = encode(single)
    assert coded[0, 0] == 0
    assert coded[1, 2] == round(255 * (np.log10(24) + 2) / 4)
    assert encode(torch.full((100, 64), 1 / 6400)).shape == (32, 32)


def test_area_and_smoothness_tell_noise_from_shapes():
    flat, single = np.ones((8, 8)), np.zeros((8, 8))
    single[3, 3] = 1
    assert effective_area(flat) == pytest.approx(1)
    assert effective_area(single) == pytest.approx(1 / 64)
    noise = np.random.default_rng(0).normal(size=(64, 64))
    ramp = np.linspace(0, 1, 64)[:, None] + np.linspace(0, 1, 64)
    assert abs(smoothness(noise)) < 0.05
    assert smoothness(ramp) > 0.99
    assert smoothness(flat) == 0


def test_the_multiscale_scene_says_where_its_objects_are():
    scene = multiscale_image(256)
    assert scene.image.shape == (256, 256, 3)
    assert len(scene.boxes) == 5
    heights = [int(y1 - y0) for _, y0, _, y1 in scene.boxes]
    assert sorted(heights, reverse=True) == heights
    assert heights[0] > 7 * heights[-1]
    assert scene.masks.sum(0).max() == 1  # nothing overlaps
    for mask, (x0, y0, x1, y1) in zip(scene.masks, scene.boxes, strict=True):
        inside = np.zeros_like(mask)
        inside[y0:y1, x0:x1] = True
        assert not (mask & ~inside).any()
    np.testing.assert_array_equal(scene.image, multiscale_image(256).image)


def test_energy_shares_are_areas_for_a_flat_map_and_all_for_a_perfect_one():
    scene = multiscale_image(128)
    for share, area in energy_shares(torch.ones(16, 16), scene.masks, (8, 8)):
        assert share == pytest.approx(area)
    perfect = energy_shares(torch.from_numpy(scene.masks[0].astype(float)), scene.masks, (1, 1))
    assert perfect[0][0] == pytest.approx(1)
    assert [share for share, _ in perfect[1:]] == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="negative"):
        energy_shares(-torch.ones(4, 4), scene.masks, (32, 32))
