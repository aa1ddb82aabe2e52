# SPDX-License-Identifier: Apache-2.0
"""The network: the paper's parameter totals, any image size, gradients everywhere, bridges, timm's contract."""

import warnings

import pytest
import timm
import torch
from timm.models import get_notrace_modules
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from sola_vision import SolaConfig, SolaVision, base, nano, ops, small, tiny
from sola_vision.layers import LinearLayer, PositionEmbedding, SoftmaxLayer

SMALL = {"dims": (8, 16, 32, 64), "num_classes": 5}


def build(**changes):
    torch.manual_seed(0)
    return SolaVision(nano(**{**SMALL, **changes})).eval()


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("size", "total"), [(tiny, 6_237_536), (small, 31_057_248), (base, 88_437_888)])
def test_parameters_equal_the_reconstruction(size, total):
    assert count(SolaVision(size(num_classes=0), device="meta")) == total


@pytest.mark.parametrize("size", [tiny, small, base])
def test_a_bridge_adds_source_times_target_plus_target_squared(size):
    config = size(num_classes=0, bridges="paper")
    added = count(SolaVision(config, device="meta")) - count(SolaVision(size(num_classes=0), device="meta"))
    dims = config.dims
    ends = [(dims[b.source.stage], dims[b.target.stage]) for b in config.parsed_bridges.bridges]
    assert added == sum(s * t + t * t for s, t in ends)


@pytest.mark.parametrize("dim", [32, 96])
def test_layers_have_the_parameters_the_paper_implies(dim):
    assert count(LinearLayer(dim)) == 13 * dim**2 + 11 * dim
    assert count(LinearLayer(dim, token_shift=False)) == 13 * dim**2 + 6 * dim
    assert count(SoftmaxLayer(dim)) == 12 * dim**2 + 36 * dim + 17 * dim


@pytest.mark.parametrize("size", [(16, 16), (17, 33), (64, 48), (97, 131), (224, 32)])
@pytest.mark.parametrize("bridges", ["", "paper"])
def test_any_image_size_gives_maps_at_strides_4_to_32(size, bridges):
    model = build(bridges=bridges)
    image = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = model.forward_intermediates(image, intermediates_only=True)
        logits = model(image)
    assert logits.shape == (2, 5)
    assert torch.isfinite(logits).all()
    for stride, channels, feature in zip((4, 8, 16, 32), SMALL["dims"], maps, strict=True):
        assert feature.shape == (2, channels, -(-size[0] // stride), -(-size[1] // stride))


@pytest.mark.parametrize("size", [(3, 64, 64), (2, 1, 64, 64), (2, 64, 64, 3), (1, 2, 3, 64, 64)])
def test_what_is_not_a_batch_of_images_is_refused(size):
    with pytest.raises(ValueError, match=r"must be \[B, 3, H, W\]"):
        SolaVision(nano())(torch.zeros(size))


def test_an_image_does_not_see_its_neighbours_in_the_batch():
    model = build(bridges="paper")
    images = torch.randn(3, 3, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(model(images)[1:2], model(images[1:2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bridges": "paper"},
        {"token_shift": False},
        {"schedule": "LL/LL/LLLLLL/LL"},
        {"schedule": "SS/SS/SSSSSS/SS", "head_dim": 8},
        {"schedule": "L/S/L/S", "bridges": "1.1>2.1 1.1>4.1 3.1>4.1", "head_dim": 16},
        {"schedule": "LLSL", "dims": (64,), "patch_size": 16},
    ],
)
def test_every_parameter_gets_a_gradient(changes):
    model = build(**changes).train()
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_bridge_carries_the_source_state_into_the_target_only():
    model = build(bridges="2.2>3.3")
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model.forward_intermediates(image, intermediates_only=True)
        model.stages[2].bridges[0].proj.weight.zero_()
        without = model.forward_intermediates(image, intermediates_only=True)
    plain = build()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".bridges." not in k})
    with torch.no_grad():
        expected = plain.forward_intermediates(image, intermediates_only=True)
    torch.testing.assert_close(without, expected)
    torch.testing.assert_close(before[:2], without[:2])
    assert not torch.allclose(before[2], without[2])


def test_several_bridges_into_one_layer_add_up():
    model = build(bridges="1.2>3.3 2.2>3.3")
    stage = model.stages[2]
    x = torch.randn(1, 4, 4, 32)
    states = {b.source: torch.randn(1, 8, 8, SMALL["dims"][b.source.stage]) for b in stage.bridge_ends}
    seen = []
    stage.layers[2].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        stage.merge = nn.Identity()
        y = x
        for layer in stage.layers[:2]:
            y, _ = layer(y)
        expected = y + sum(b(y, states[e.source]) for b, e in zip(stage.bridges, stage.bridge_ends, strict=True))
        stage(x, states)
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize("bridges", ["", "paper"])
def test_activation_checkpointing_changes_nothing(bridges):
    model = build(bridges=bridges).train()
    image = torch.randn(2, 3, 32, 48)
    grads = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(image).square().sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_stochastic_depth_grows_linearly_and_acts_in_training_only():
    model = build(drop_path_rate=0.3)
    rates = [layer.drop_path.drop_prob for stage in model.stages for layer in stage.layers]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.3, 12))
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(image), model(image), rtol=0, atol=0)
        assert not torch.equal(model.train()(image), model(image))


@pytest.mark.parametrize("size", [(31, 9), (16, 40), (1, 1), (64, 64)])
def test_positions_are_torchs_bicubic_interpolation(size):
    position = PositionEmbedding(16, 8)
    torch.nn.init.normal_(position.weight)
    expected = torch.nn.functional.interpolate(position.weight, size, mode="bicubic", align_corners=False)
    found = position(torch.zeros(2, *size, 8))
    torch.testing.assert_close(found, expected.permute(0, 2, 3, 1).expand(2, -1, -1, -1), rtol=0, atol=3e-6)
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(0))
    (own,) = torch.autograd.grad(found, position.weight, grad)
    (wanted,) = torch.autograd.grad(expected, position.weight, grad.sum(0, keepdim=True).permute(0, 3, 1, 2))
    torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-4)


def test_position_embedding_is_exact_on_its_own_grid_and_interpolated_elsewhere():
    model = build(img_size=64)
    weight = model.position.weight
    own = model.position(torch.zeros(1, 16, 16, 8))
    torch.testing.assert_close(own, weight.permute(0, 2, 3, 1))
    other = model.position(torch.zeros(1, 9, 31, 8))
    assert other.shape == (1, 9, 31, 8)
    weight.data.fill_(0.25)
    torch.testing.assert_close(model.position(torch.zeros(1, 9, 31, 8)), torch.full((1, 9, 31, 8), 0.25))


def test_the_path_of_the_operator_is_invisible_in_results_and_keys():
    model = build(bridges="paper")
    image = torch.randn(1, 3, 40, 24)
    with torch.no_grad():
        expected = model(image)
        for path in ("reference", "portable"):
            with ops.use(path):
                torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_network_runs_in_other_dtypes(dtype):
    model = build(bridges="paper").to(dtype)
    out = model(torch.randn(1, 3, 33, 33, dtype=dtype))
    assert out.dtype == dtype
    assert torch.isfinite(out).all()


def test_autocast_stays_near_float32():
    model = build()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(image)
    assert (out.float() - expected).abs().max() < 0.05 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("name", ["sola_nano", "sola_tiny", "sola_small", "sola_base"])
def test_timm_creates_the_family_by_name(name):
    assert timm.is_model(name)
    assert name in timm.list_models(module="sola")
    model = timm.create_model(name, num_classes=7, device="meta", bridges="paper", drop_path_rate=0.4)
    assert model.num_classes == 7
    assert model.config.drop_path_rate == 0.4
    features = timm.create_model(name, features_only=True, out_indices=(1, 3), device="meta")
    assert features.feature_info.reduction() == [8, 32]
    assert features.feature_info.channels() == [model.config.dims[1], model.config.dims[3]]


def test_timm_refuses_what_it_cannot_do():
    with pytest.raises(TypeError, match="shedule"):
        timm.create_model("sola_nano", shedule="LL/LL/LLSLLS/LS")
    with pytest.raises(ValueError, match="forward_intermediates"):
        timm.create_model("sola_nano", features_only=True, feature_cls="list")
    with pytest.raises(ValueError, match="feature_cls='fx'"):
        timm.create_model("vrwkv_tiny", features_only=True, feature_cls="fx")
    with pytest.raises(RuntimeError, match="sola_nano"):
        timm.create_model("sola_nano", pretrained=True)


def test_timm_schedule_and_dims_are_arguments():
    model = timm.create_model(
        "sola_tiny", schedule="LLLSLL", dims=(192,), patch_size=16, num_classes=0, features_only=True
    )
    maps = model(torch.randn(1, 3, 64, 96))
    assert [m.shape for m in maps] == [(1, 192, 4, 6)]
    assert model.feature_info.reduction() == [16]


def test_a_head_needs_pooled_features():
    with pytest.raises(ValueError, match=r"global_pool='' keeps the feature map, .* use num_classes=0"):
        timm.create_model("sola_nano", global_pool="", num_classes=10)
    with pytest.raises(ValueError, match="num_classes=3"):
        build().reset_classifier(3, "")
    with pytest.raises(ValueError, match="num_classes=3"):
        SolaVision(nano(num_classes=3), global_pool="")
    pruned = build()
    pruned.prune_intermediate_layers([0])  # also removes the pool
    with pytest.raises(ValueError, match="num_classes=3"):
        pruned.reset_classifier(3)
    pruned.reset_classifier(3, "avg")
    assert pruned(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_the_width_before_the_classifier_depends_on_the_pool():
    model, image = build(num_classes=0), torch.randn(1, 3, 32, 32)
    for pool in ("avg", "catavgmax", "max"):
        model.reset_classifier(0, pool)
        assert model(image).shape[1] == model.head_hidden_size
    built = timm.create_model("sola_nano", num_classes=0, global_pool="catavgmax")
    assert built(image).shape[1] == built.head_hidden_size == 2 * built.num_features


def test_reset_classifier_keeps_the_backbone():
    model = build()
    image = torch.randn(1, 3, 32, 32)
    features = model.forward_features(image)
    model.reset_classifier(3)
    assert model(image).shape == (1, 3)
    model.reset_classifier(0)
    assert model(image).shape == (1, 64)
    torch.testing.assert_close(model.forward_features(image), features)


def test_group_matcher_orders_every_parameter_by_depth():
    from timm.models import group_parameters

    model = build(bridges="paper")
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert set(groups) == {name for name, _ in model.named_parameters()}
    assert groups["stem.proj.weight"] == groups["position.weight"] == 0
    order = [groups[f"stages.{s}.layers.{n}.norm1.weight"] for s, d in enumerate((2, 2, 6, 2)) for n in range(d)]
    assert order == sorted(set(order))
    assert groups["head.fc.weight"] >= order[-1]


def test_config_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match="multiple of head_dim"):
        SolaVision(SolaConfig(schedule="S", dims=(33,)))


@pytest.mark.parametrize(("grad", "img_size"), [(True, 224), (False, 224), (False, 64)])
def test_a_traced_file_is_the_network(tmp_path, grad, img_size):
    model, image = build(img_size=img_size), torch.randn(1, 3, 42, 57)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, torch.randn(2, 3, 64, 64)).save(tmp_path / "traced.pt")
        found = torch.jit.load(tmp_path / "traced.pt")(image)
    torch.testing.assert_close(found, model(image), rtol=1e-4, atol=1e-5)


def test_a_compiled_network_takes_images_of_other_sizes():
    model = build(schedule="LS", dims=(32,))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    for size in ((64, 64), (96, 64), (97, 131)):  # the second makes sizes symbols
        image = torch.randn(1, 3, *size)
        torch.testing.assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-5)


def test_gradients_of_each_image_by_torch_func():
    model = build()
    images, parameters = torch.randn(2, 1, 3, 40, 56), dict(model.named_parameters())

    def loss(parameters, image):
        return torch.func.functional_call(model, parameters, (image,)).square().mean()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, images)
    for i, image in enumerate(images):
        singly = torch.autograd.grad(loss(parameters, image), list(parameters.values()))
        for name, gradient in zip(parameters, singly, strict=True):
            torch.testing.assert_close(together[name][i], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("grad", [True, False])
def test_a_traced_onnx_file_is_the_network(tmp_path, grad):
    """torch.onnx.export with dynamo=False, with and without gradients: neither what inference writes to bands nor what
    a training step computes again may be lost.
    """
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, images = build(bridges="paper"), torch.randn(2, 3, 64, 64)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the exporter that traces
        torch.onnx.export(model, (images,), tmp_path / "model.onnx", dynamo=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        expected = model(images)
    assert (torch.from_numpy(logits) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("bridges", ["", "paper"])
def test_a_graph_of_timms_leaves_runs_the_same_kernels(bridges):
    model, image = timm.create_model("sola_nano", bridges=bridges).eval(), torch.randn(2, 3, 97, 131)
    leaves = {"leaf_modules": get_notrace_modules()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision: drop path is in the graph for training only
        extract = create_feature_extractor(model, ["norm", "head.fc"], tracer_kwargs=leaves)
    with torch.inference_mode():
        maps, logits = extract(image).values()
        assert torch.equal(logits, model(image))
        assert torch.equal(maps.permute(0, 3, 1, 2), model.forward_features(image))


@pytest.mark.parametrize("name", ["sola_nano", "vrwkv_tiny"])
def test_feature_maps_take_any_pool_of_the_head_that_is_removed(name):
    image = torch.randn(1, 3, 32, 32)
    found = []
    for pool in ({}, {"global_pool": ""}):
        torch.manual_seed(0)
        found.append(timm.create_model(name, features_only=True, **pool)(image))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
