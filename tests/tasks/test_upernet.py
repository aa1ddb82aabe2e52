# SPDX-License-Identifier: Apache-2.0
"""UPerNet: the heads of Hugging Face with copied weights, any image size, groups and frozen stages of its backbone."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from sola_vision import save_pretrained
from sola_vision.engine import TrainConfig, save_weights
from sola_vision.engine.optim import make_optimizer
from sola_vision.tasks import initialise
from sola_vision.tasks.pyramid import Pyramid, create_body
from sola_vision.tasks.upernet import FCNHead, UPerHead, UPerNet, UPerNetConfig

SMALL = {"dims": (8, 16, 24, 32), "head_dim": 8}


def body(**changes):
    return timm.create_model("sola_nano", features_only=True, **{**SMALL, **changes})


def network(classes=5, **changes):
    torch.manual_seed(0)
    return UPerNet(body(), classes, UPerNetConfig(channels=16, auxiliary_channels=8, **changes))


def paired(ours, theirs):
    """Copy weights by order of names within each part; every tensor of `theirs` must be used."""
    state = theirs.state_dict()
    assert [v.shape for v in ours.state_dict().values()] == [v.shape for v in state.values()]
    ours.load_state_dict(dict(zip(ours.state_dict(), state.values(), strict=True)))


@pytest.mark.parametrize("sizes", [((32, 40), (16, 20), (8, 10), (4, 5)), ((25, 33), (13, 17), (7, 9), (4, 5))])
def test_heads_equal_those_of_hugging_face(sizes):
    upernet = pytest.importorskip("transformers.models.upernet.modeling_upernet", reason="needs transformers")
    config = upernet.UperNetConfig(hidden_size=16, auxiliary_channels=12, num_labels=7, backbone_config=None)
    channels = [8, 16, 24, 32]
    torch.manual_seed(0)
    theirs, auxiliary = upernet.UperNetHead(config, channels), upernet.UperNetFCNHead(config, channels)
    ours, ours_auxiliary = UPerHead(channels, 16, 7, dropout=0.0), FCNHead(24, 12, 7, dropout=0.0)
    for module in (*theirs.modules(), *auxiliary.modules()):  # statistics and affine parameters that have an effect
        if isinstance(module, nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean):
                nn.init.normal_(value)
            nn.init.uniform_(module.running_var, 0.5, 2)
    for mine, part in (
        (ours.pools, theirs.psp_modules),
        (ours.bottleneck, theirs.bottleneck),
        (ours.laterals, theirs.lateral_convs),
        (ours.smooth, theirs.fpn_convs),
        (ours.fuse, theirs.fpn_bottleneck),
        (ours.classifier, theirs.classifier),
        (ours_auxiliary.convolution, auxiliary.convs),
        (ours_auxiliary.classifier, auxiliary.classifier),
    ):
        paired(mine, part)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    maps = [torch.randn(2, count, *size) for count, size in zip(channels, sizes, strict=True)]
    for train in (False, True):
        for module in (theirs, auxiliary, ours, ours_auxiliary):
            module.train(train)
        assert torch.equal(ours(maps), theirs(maps))
        assert torch.equal(ours_auxiliary(maps[2]), auxiliary(maps))


@pytest.mark.parametrize("size", [(64, 64), (97, 131), (33, 250), (1, 1)])
def test_logits_have_the_size_of_the_image(size):
    model = network().eval()
    assert model(torch.randn(1, 3, *size)).shape == (1, 5, *size)
    maps = model.backbone(torch.randn(1, 3, *size))
    assert model.backbone.strides == [4, 8, 16, 32]
    assert [tuple(x.shape[1:]) for x in maps] == [
        (dim, -(-size[0] // stride), -(-size[1] // stride))
        for dim, stride in zip(SMALL["dims"], (4, 8, 16, 32), strict=True)
    ]


def test_every_parameter_learns():
    model = network()
    main, auxiliary = model(torch.randn(2, 3, 64, 64))
    (main.square().mean() + auxiliary.square().mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert network(auxiliary_weight=0.0)(torch.randn(2, 3, 64, 64)).shape == (2, 5, 64, 64)


def test_layer_decay_falls_from_the_head_to_the_stem():
    model = network()
    scales = {}
    names = {id(p): name for name, p in model.named_parameters()}
    for group in param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.8):
        scales |= {names[id(p)]: (group["lr_scale"], group["weight_decay"]) for p in group["params"]}
    assert scales.keys() == set(names.values())
    assert {scale for name, (scale, _) in scales.items() if not name.startswith("backbone.body")} == {1.0}
    inside = "backbone.body.model."
    steps = [scales[f"{inside}{name}.norm1.weight"][0] for name in ("stages.0.layers.0", "stages.2.layers.3")]
    assert scales[f"{inside}stem.proj.weight"][0] < steps[0] < steps[1] < 1
    # a merge belongs to the layer that it feeds
    assert scales[f"{inside}stages.2.merge.reduction.weight"][0] < scales[f"{inside}stages.2.layers.1.norm1.weight"][0]
    assert scales[f"{inside}position.weight"][1] == 0


def test_frozen_stages_keep_their_weights():
    model = network(frozen_stages=2)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    inside = "backbone.body.model."
    assert all(
        name.startswith(tuple(inside + x for x in ("stem", "position", "stages.0", "stages.1"))) for name in frozen
    )
    with pytest.raises(ValueError, match=r"frozen_stages=5 must lie in 0..4"):
        network(frozen_stages=5)


def test_checkpointing_changes_no_gradient():
    image = torch.randn(2, 3, 64, 64)
    gradients = []
    for checkpointing in (False, True):
        model = network(dropout=0.0, checkpointing=checkpointing)
        model(image)[0].square().mean().backward()
        gradients.append([p.grad for p in model.backbone.body.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_a_pyramid_needs_four_levels_of_doubling_strides():
    assert Pyramid(timm.create_model("resnet18", features_only=True)).channels == [64, 128, 256, 512]
    for flat in ("vit_tiny_patch16_224",):
        with pytest.raises(ValueError, match="dense tasks need four, each twice the previous one"):
            Pyramid(timm.create_model(flat, features_only=True))
    with pytest.raises(ValueError, match="layer_decay is not supported for timm's"):
        UPerNet(timm.create_model("resnet18", features_only=True), 5, UPerNetConfig(channels=8)).group_matcher()


@pytest.mark.parametrize(
    ("name", "size", "finest"),
    [
        ("swin_tiny_patch4_window7_224", (45, 67), (12, 17)),
        ("swinv2_cr_tiny_ns_224", (64, 96), (16, 24)),
        ("mambaout_femto", (45, 67), (12, 17)),
    ],
)
def test_networks_whose_maps_are_channels_last_or_whose_size_was_fixed(name, size, finest):
    pyramid = Pyramid(create_body(name, {}, size))
    for height, width in (size, (224, 224)):
        maps = pyramid(torch.randn(1, 3, height, width))
        assert [x.shape[1] for x in maps] == pyramid.channels
    assert maps[0].shape[2:] == (56, 56)
    assert pyramid(torch.randn(1, 3, *size))[0].shape[2:] == finest


def test_a_network_for_one_size_is_refused_when_it_is_built():
    with pytest.raises(
        ValueError, match=r"it does not take images of 64x96 pixels .*choose a network for any image size"
    ):
        create_body("hiera_tiny_224", {}, (64, 96))
    with pytest.raises(ValueError, match="strides 16, 16, 16"):
        create_body("vit_tiny_patch16_224", {}, (64, 96))


def test_looking_whether_a_size_fits_leaves_no_trace():
    torch.manual_seed(0)
    tried = create_body("resnet18", {}, (45, 67))
    torch.manual_seed(0)
    fresh = timm.create_model("resnet18", features_only=True)
    assert all(module.training for module in tried.modules())
    assert all(torch.equal(value, fresh.state_dict()[name]) for name, value in tried.state_dict().items())


# starting from a classifier ---------------------------------------------------------------------------------------
def test_a_classifiers_weights_start_the_backbone(tmp_path):
    classifier = timm.create_model("sola_nano", num_classes=3, **SMALL, img_size=32)
    pyramid = Pyramid(body(img_size=64))
    said = pyramid.start_from(classifier.state_dict(), tmp_path / "c")
    assert "position embedding interpolated" in said
    own = pyramid.body.model.state_dict()
    same = {name for name, value in classifier.state_dict().items() if name in own and torch.equal(own[name], value)}
    assert set(own) - same == {"position.weight"}


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_any_classifier_of_timm_starts_its_backbone(tmp_path, name):
    classifier = timm.create_model(name, num_classes=3)
    pyramid = Pyramid(timm.create_model(name, features_only=True))
    pyramid.start_from(classifier.state_dict(), tmp_path / "c")
    image = torch.randn(1, 3, 64, 64)
    expected = classifier.eval().forward_features(image)
    assert torch.equal(pyramid.eval().body(image)[-1], expected)


def test_a_swin_of_its_own_size_starts_one_of_any_size(tmp_path):
    name = "swin_tiny_patch4_window7_224"
    classifier = timm.create_model(name, num_classes=3).eval()
    pyramid = Pyramid(create_body(name, {}, (45, 67))).eval()
    pyramid.start_from(classifier.state_dict(), tmp_path / "c")
    image = torch.randn(1, 3, 224, 224)
    assert torch.allclose(classifier.norm(pyramid.body(image)[-1]), classifier.forward_features(image), atol=1e-5)


def test_links_are_dropped_only_when_asked_for(tmp_path):
    classifier = timm.create_model("sola_nano", num_classes=3, bridges="paper", **SMALL)
    pyramid = Pyramid(body())
    before = {name: value.clone() for name, value in pyramid.state_dict().items()}
    with pytest.raises(ValueError, match=r"unexpected .*bridges.*use drop_bridges to skip bridges"):
        pyramid.start_from(classifier.state_dict(), tmp_path / "c")
    assert all(torch.equal(value, pyramid.state_dict()[name]) for name, value in before.items())
    assert "weights of bridges dropped)" in pyramid.start_from(
        classifier.state_dict(), tmp_path / "c", drop_bridges=True
    )
    with_bridges = Pyramid(body(bridges="paper"))
    assert "bridges" not in with_bridges.start_from(classifier.state_dict(), tmp_path / "c")


def test_another_network_is_refused(tmp_path):
    classifier = timm.create_model("sola_nano", num_classes=3, dims=(8, 16, 24, 40), head_dim=8)
    with pytest.raises(ValueError, match=r"does not fit the backbone: .*resized"):
        Pyramid(body()).start_from(classifier.state_dict(), tmp_path / "c")


def test_another_network_whose_file_describes_it_names_the_option(tmp_path):
    classifier = timm.create_model("sola_nano", num_classes=3, **{**SMALL, "dims": (16, 16, 24, 40)})
    save_pretrained(classifier, tmp_path)
    with pytest.raises(ValueError, match=r"the file is of sola_nano .*: use --model\.dims '\[16,16,24,40\]'$"):
        Pyramid(body()).start_from(classifier.state_dict(), tmp_path / "model.safetensors")


def test_a_checkpoint_of_another_task_is_named_as_such(tmp_path):
    model = UPerNet(body(), 5, UPerNetConfig(channels=8))
    about = {"task": '"segmentation"', "model": '{"name": "sola_nano"}', "image": "{}", "classes": "[]"}
    save_weights(tmp_path / "best.safetensors", model, about)
    classifier = timm.create_model("sola_nano", num_classes=3, **SMALL)
    with pytest.raises(ValueError, match="it is a checkpoint of the task 'segmentation': use a classifier's"):
        initialise(classifier, tmp_path / "best.safetensors")
    save_weights(tmp_path / "state.safetensors", model)
    with pytest.raises(ValueError, match="it is the state that --resume continues from"):
        initialise(classifier, tmp_path / "state.safetensors")


def test_swin_keeps_its_parameters_without_weight_decay():
    """timm takes the network apart for its maps and loses the list."""
    model = UPerNet(create_body("swin_tiny_patch4_window7_224", {}, (64, 64)), 5, UPerNetConfig(channels=8))
    tables = {name for name, _ in model.named_parameters() if name.endswith("relative_position_bias_table")}
    assert len(tables) == 12
    assert model.no_weight_decay() == tables
    optimizer = make_optimizer(model, TrainConfig(weight_decay=0.1, epochs=1, warmup_epochs=0))
    free = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert all(id(parameter) in free for name, parameter in model.named_parameters() if name in tables)
