# SPDX-License-Identifier: Apache-2.0
"""Vision-RWKV's networks: published weights give published logits; timm's contract holds."""

from functools import partial

import pytest
import timm
import torch
from naive_vrwkv import kernel, logits, weights
from safetensors.torch import save_file

import sola_vision
from sola_vision.engine import read_metadata
from sola_vision.ops import reference
from sola_vision.vrwkv import VrwkvConfig
from sola_vision.vrwkv_weights import from_published, is_published

# tiny, small, large as they are published, but narrow
KINDS = {
    "vrwkv_tiny": {},
    "vrwkv_small": {"scaled": True},
    "vrwkv_large": {"scaled": True, "normed": True, "hidden": 24},
}


def saved(path, stored):
    torch.save({"meta": {"epoch": 100}, "state_dict": stored}, path)
    return path


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def test_mixes_are_modules_that_hooks_observe(kind):
    model, calls = timm.create_model(kind, dim=8, depth=2), []
    for name, module in model.named_modules():
        if name.endswith((".mixer", ".channel_mix")):
            module.register_forward_hook(lambda module, inputs, out, name=name: calls.append(name))
    model(torch.randn(1, 3, 32, 32))
    assert calls == [f"layers.{layer}.{mix}" for layer in range(2) for mix in ("mixer", "channel_mix")]


def test_early_files_of_this_package_load(tmp_path):
    """In them the norms inside the mixes belong to the layer."""
    model = timm.create_model("vrwkv_large", dim=8, depth=2, head_hidden=4, num_classes=3)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    sola_vision.save_pretrained(model, tmp_path)
    stored = {
        name.replace("mixer.readout_norm", "readout_norm").replace("channel_mix.hidden_norm", "hidden_norm"): value
        for name, value in model.state_dict().items()
    }
    assert stored.keys() != model.state_dict().keys()
    save_file(stored, tmp_path / "model.safetensors", read_metadata(tmp_path / "model.safetensors"))
    for loaded in (sola_vision.load(tmp_path), timm.create_model(f"local-dir:{tmp_path}", pretrained=True)):
        for name, value in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value)


def test_the_device_asked_for_is_used_under_another_default():
    with torch.device("meta"):
        model = timm.create_model("vrwkv_tiny", dim=8, depth=1, device="cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_a_head_needs_pooled_features():
    with pytest.raises(ValueError, match="global_pool='' keeps the feature map"):
        timm.create_model("vrwkv_tiny", dim=8, depth=1, global_pool="", num_classes=5)
    model = timm.create_model("vrwkv_tiny", dim=8, depth=1, num_classes=0, global_pool="catavgmax")
    assert model(torch.randn(1, 3, 32, 32)).shape[1] == model.head_hidden_size == 16
    with pytest.raises(ValueError, match="num_classes=5"):
        model.reset_classifier(5, "")
    # the hidden layer's head classifies every position
    large = timm.create_model("vrwkv_large", dim=8, depth=1, head_hidden=4, global_pool="", num_classes=5)
    assert large(torch.randn(1, 3, 32, 32)).shape == (1, 5, 2, 2)


def test_published_weights_give_published_logits(tmp_path, kind):
    stored = weights(**KINDS[kind])
    model = sola_vision.load(saved(tmp_path / "vrwkv.pth", stored))
    assert model.pretrained_cfg["architecture"] == kind
    assert not model.load_report
    images = torch.randn(2, 3, 32, 32)
    wanted = logits(stored, images)
    with torch.inference_mode():
        assert (model(images) - wanted).abs().max() < 1e-5 * wanted.abs().max()
        assert (model.double()(images.double()) - wanted).abs().max() < 1e-12 * wanted.abs().max()


def test_with_eq9_the_operator_alone_differs(tmp_path, kind):
    stored = weights(side=7, **KINDS[kind])
    model = sola_vision.load(saved(tmp_path / "vrwkv.pth", stored), eq9=True)
    images = torch.randn(2, 3, 56, 56)
    eq9 = logits(stored, images, lambda decay, bonus, k, v: reference.wkv(decay, bonus / k.shape[1], k, v))
    published = logits(stored, images)
    with torch.inference_mode():
        ours = model(images)
    assert (ours - eq9).abs().max() < 1e-5 * eq9.abs().max()
    assert (published - eq9).abs().max() > 1e-4 * eq9.abs().max()  # 49 tokens: the two can be told apart


def test_timm_reads_the_files_too(tmp_path):
    stored = weights(dim=16, depth=2)
    path = saved(tmp_path / "vrwkv_t.pth", stored)
    create = partial(timm.create_model, "vrwkv_tiny", dim=16, depth=2, patch_size=8, img_size=32, num_classes=10)
    model = create(pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 10}).eval()
    images = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(model(images), sola_vision.load(path)(images))


@pytest.mark.parametrize(("name", "millions"), [("tiny", 6.16), ("small", 23.82), ("base", 93.65), ("large", 334.88)])
def test_sizes_are_those_that_were_published(name, millions):
    # 6.2, 23.8, 93.7 and 334.9 M in its table
    model = timm.create_model(f"vrwkv_{name}", device="meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)


def test_everything_in_a_file_has_a_place_or_is_listed(tmp_path):
    stored = weights() | {"backbone.level_embed": torch.zeros(3, 16), "neck.conv.weight": torch.zeros(1)}
    path = saved(tmp_path / "adapter.pth", stored)
    with pytest.raises(ValueError, match=r"2 unexpected \(level_embed, neck.conv.weight\)"):
        sola_vision.load(path)
    model = sola_vision.load(path, partial=True)
    assert model.load_report.unexpected == ("level_embed", "neck.conv.weight")
    del stored["backbone.layers.1.ffn.key.weight"]
    with pytest.raises(ValueError, match=r"1 missing \(layers.1.channel_mix.key.weight\)"):
        sola_vision.load(saved(path, stored))


def test_a_backbone_without_head_loads(tmp_path):
    model = sola_vision.load(saved(tmp_path / "backbone.pth", weights(head=False)))
    assert not model.load_report
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 16)


def test_other_networks_are_refused_by_name(tmp_path):
    second = {"backbone.layers.0.att.time_decay": torch.zeros(1), "backbone.pos_embed": torch.zeros(1)}
    with pytest.raises(ValueError, match="Vision-RWKV 6") as info:
        sola_vision.load(saved(tmp_path / "vrwkv6.pth", second))
    assert str(tmp_path) in str(info.value)
    stored = weights()
    stored["backbone.pos_embed"] = torch.zeros(1, 15, 16)
    with pytest.raises(ValueError, match="square pos_embed"):
        sola_vision.load(saved(tmp_path / "wide.pth", stored))
    assert not is_published(timm.create_model("resnet18").state_dict())


def test_from_published_tells_what_a_file_shows(kind):
    name, fields = from_published(weights(dim=8, depth=2, side=3, patch=4, classes=7, **KINDS[kind]))
    assert name == kind
    config = timm.create_model(name, **fields).config
    assert (config.dim, config.depth, config.patch_size, config.img_size) == (8, 2, 4, 12)
    assert (config.num_classes, config.key_norm, config.head_hidden) == (7, kind == "vrwkv_large", 24 * config.key_norm)
    assert (config.layer_scale is None) == (kind == "vrwkv_tiny")


def test_every_parameter_learns_and_any_size_passes(kind):
    small = {"dim": 16, "depth": 2, "num_classes": 5, "patch_size": 8}
    model = timm.create_model(kind, **small)
    for size in ((32, 32), (19, 45), (1, 1)):
        model(torch.randn(2, 3, *size)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_feature_maps_and_heads_follow_timms_contract():
    model = timm.create_model("vrwkv_tiny", dim=16, depth=4, num_classes=5)
    image = torch.randn(1, 3, 64, 96)
    final, maps = model.forward_intermediates(image, indices=[1, 3], norm=True)
    assert [tuple(x.shape) for x in maps] == [(1, 16, 4, 6)] * 2
    assert torch.equal(final, maps[1])
    assert torch.allclose(model.forward_head(final), model(image))
    body = timm.create_model("vrwkv_tiny", dim=16, depth=4, features_only=True, out_indices=(0, 2))
    assert (body.feature_info.channels(), body.feature_info.reduction()) == ([16, 16], [16, 16])
    assert len(body(image)) == 2
    model.reset_classifier(0)
    assert model(image).shape == (1, 16)
    model.set_grad_checkpointing()
    model(image).sum().backward()
    assert set(model.group_matcher()) == {"stem", "blocks"}


@pytest.mark.parametrize(
    ("changes", "says"),
    [({"dim": 6}, "dim=6"), ({"dim": 0}, "dim=0"), ({"dim": 8, "drop_path_rate": 1.0}, "drop_path_rate=1.0")],
)
def test_a_config_that_does_not_fit_together_is_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        VrwkvConfig(**changes)


def test_the_restated_kernel_reads_every_token_where_nothing_decays():
    key, value = torch.randn(1, 40, 3), torch.randn(1, 40, 3)
    read = kernel(torch.zeros(3), torch.zeros(3), key, value)
    mean = (key.double().exp() * value).sum(1, keepdim=True) / key.double().exp().sum(1, keepdim=True)
    assert (read - mean).abs().max() < 1e-6
