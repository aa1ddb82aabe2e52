# SPDX-License-Identifier: Apache-2.0
"""The detector: its pyramid at odd sizes, its differences from torchvision's, gradients, checkpoints."""

import math
from dataclasses import asdict

import pytest
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from sola_vision.data import DetectionConfig
from sola_vision.engine import TrainConfig, save_weights
from sola_vision.engine.optim import make_optimizer
from sola_vision.tasks import ModelConfig, build_model, metadata
from sola_vision.tasks.detector import (
    DetectorConfig,
    backbone_of,
    build_detector,
    detect,
    load_detector,
    start_detector,
)
from sola_vision.tasks.rcnn import AlignedRoIAlign, FixedAnchors, L1RegionProposals, _box_losses, _mask_loss

NETWORK = ModelConfig(name="sola_nano", dims=(8, 16, 32, 32))
SMALL = DetectorConfig(channels=16, box_channels=32, group_norm=True, anchor_scale=4, proposals=50, samples=16)
IMAGE = DetectionConfig(size=64, longest=96)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def small(image=IMAGE, detector=SMALL, network=NETWORK, classes=3):
    return build_detector(network, detector, image, classes)


def target(*boxes, size=(64, 80), label=1):
    masks = torch.zeros(len(boxes), *size, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = 1
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.full((len(boxes),), label),
        "masks": masks,
    }


def noise(*size):
    return torch.randint(0, 256, (3, *size), dtype=torch.uint8)


@pytest.mark.parametrize("size", [(64, 96), (97, 131), (33, 45)])
def test_feature_maps_have_the_strides_that_torchvision_expects(size):
    model = small(DetectionConfig(size=None, longest=200)).eval()
    batch, _ = model.transform([noise(*size)])
    padded = [32 * math.ceil(side / 32) for side in size]
    assert list(batch.tensors.shape[-2:]) == padded
    maps = model.backbone(batch.tensors)
    assert list(maps) == ["0", "1", "2", "3", "pool"]
    for stride, level in zip((4, 8, 16, 32), maps.values(), strict=False):
        assert list(level.shape) == [1, 16, *(side // stride for side in padded)]
    # and without padding, at any size: a partial stride gets a cell
    for stride, level in zip((4, 8, 16, 32), model.pyramid(torch.zeros(1, 3, *size)), strict=True):
        assert list(level.shape[-2:]) == [math.ceil(side / stride) for side in size]


def test_every_parameter_learns_and_losses_have_the_same_names_without_objects():
    model = small().train()
    losses = model([noise(64, 80), noise(60, 64)], [target((5, 5, 40, 30)), target(size=(60, 64))])
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    model.zero_grad()
    empty = model([noise(64, 64)], [target(size=(64, 64))])
    assert empty.keys() == losses.keys()
    sum(empty.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []


def test_boxes_alone_make_a_faster_rcnn():
    model = small(DetectionConfig(size=64, longest=96, masks=False))
    assert not model.has_masks
    boxes = {name: value for name, value in target((5, 5, 40, 30)).items() if name != "masks"}
    assert set(model.train()([noise(64, 80)], [boxes])) == {
        "loss_objectness",
        "loss_rpn_box_reg",
        "box_class",
        "box_l1",
    }
    assert set(detect(model.eval(), [noise(50, 70)])[0]) == {"boxes", "labels", "scores"}


def test_what_is_found_is_in_the_pixels_of_the_original_and_no_neighbour_changes_it():
    model = small(detector=DetectorConfig(**{**asdict(SMALL), "score_threshold": 0.0})).eval()
    first, second = noise(50, 70), noise(200, 90)
    together, alone = detect(model, [first, second]), detect(model, [second])
    for name in together[1]:
        assert torch.equal(together[1][name], alone[0][name])
    boxes = alone[0]["boxes"]
    assert len(boxes) > 3
    assert boxes.min() >= 0
    assert (boxes.amax(0) <= torch.tensor([90, 200, 90, 200]) + 1e-3).all()
    assert boxes[:, 3].max() > 96  # more than the resized image
    assert alone[0]["masks"].shape == (len(boxes), 28, 28)
    assert (alone[0]["scores"].diff() <= 0).all()


# differences from torchvision's Mask R-CNN ----------------------------------------------------------------------------
def test_aligned_roi_align_reads_a_ramp_at_the_centres_of_its_bins():
    rows = torch.arange(16.0)[:, None].expand(16, 16)
    features = {str(i): (rows * 4 + 2)[None, None] if i == 0 else torch.zeros(1, 1, 4, 4) for i in range(4)}
    box = torch.tensor([[8.0, 9.0, 22.0, 37.0]])  # its level is the first, of stride 4: cell r is centred at 4 r + 2
    cut = AlignedRoIAlign(7, (4, 8, 16, 32))(features, [box], [(64, 64)])
    centres = 9 + (torch.arange(7) + 0.5) * 28 / 7
    assert torch.allclose(cut[0, 0], centres[:, None].expand(7, 7), atol=1e-4)


def test_roi_align_chooses_levels_as_torchvision_does():
    sides = [10, 55, 57, 100, 113, 220, 225, 450, 2000]
    boxes = torch.tensor([[0.0, 0.0, side, side] for side in sides])
    features = {str(i): torch.full((1, 1, 512 // 2**i, 512 // 2**i), float(i)) for i in range(4)}
    mine = AlignedRoIAlign(2, (4, 8, 16, 32))(features, [boxes], [(2048, 2048)])
    theirs = MultiScaleRoIAlign(["0", "1", "2", "3"], 2, 2)(features, [boxes], [(2048, 2048)])
    assert torch.equal(mine[:, 0, 0, 0], theirs[:, 0, 0, 0])
    assert mine[:, 0, 0, 0].tolist() == [0, 0, 0, 0, 1, 1, 2, 3, 3]


def test_anchors_lie_at_multiples_of_the_stride_in_every_map():
    anchors = FixedAnchors((4, 64), 8, (0.5, 1.0, 2.0))
    maps = [torch.zeros(1, 1, 24, 24), torch.zeros(1, 1, 2, 2)]  # 96 pixels: torchvision would take 48 for the second
    (found,) = anchors(ImageList(torch.zeros(1, 3, 96, 96), [(96, 96)]), maps)
    assert found.shape == (3 * (24 * 24 + 4), 4)
    centres = (found[:, :2] + found[:, 2:]) / 2
    assert torch.allclose(centres[-1], torch.tensor([64.0, 64.0]))
    assert torch.allclose(centres[3], torch.tensor([4.0, 0.0]))
    width, height = (found[:3, 2:] - found[:3, :2]).T
    assert torch.allclose(width * height, torch.tensor(32.0**2))
    assert torch.allclose(height / width, torch.tensor([0.5, 1.0, 2.0]))


def test_boxes_learn_by_l1():
    rpn = small().rpn
    assert isinstance(rpn, L1RegionProposals)
    deltas, wanted = torch.zeros(4, 4), torch.full((4, 4), 0.05)
    labels = [torch.tensor([1.0, 0.0, 1.0, 0.0])]
    _, loss = rpn.compute_loss(torch.zeros(4, 1), deltas, labels, [wanted])
    assert loss.item() == pytest.approx(2 * 4 * 0.05 / 4)  # two objects of four anchors; smooth L1 would give 0.045
    scores, regression = torch.zeros(4, 3), torch.zeros(4, 12)
    regression[0, 8:12] = 1.0  # of class 2
    entropy, loss = _box_losses(scores, regression, [torch.tensor([2, 0, 0, 1])], [torch.full((4, 4), 0.5)])
    assert loss.item() == pytest.approx((4 * 0.5 + 4 * 0.5) / 4)
    assert entropy.item() == pytest.approx(math.log(3))


def test_mask_targets_are_zero_or_one_and_those_of_the_owner():
    masks = target((10, 10, 30, 30), (40, 10, 60, 30), size=(64, 80))["masks"]
    boxes = torch.tensor([[40.0, 10.0, 80.0, 50.0]])
    logits = torch.full((1, 3, 28, 28), -30.0)
    # a quarter of the box is the second object: its bins are 1, all others 0
    logits[0, 2, :14, :14] = 30.0
    owner = torch.tensor([1])
    assert _mask_loss(logits, [boxes], [owner], torch.tensor([2]), [masks]).item() < 1e-6
    assert _mask_loss(logits, [boxes], [torch.tensor([0])], torch.tensor([2]), [masks]).item() > 1
    assert _mask_loss(logits, [boxes], [owner], torch.tensor([1]), [masks]).item() > 1


# training ------------------------------------------------------------------------------------------------------------
def test_frozen_stages_keep_their_weights_and_checkpointing_changes_nothing():
    torch.manual_seed(1)
    plain = small()
    other = small(detector=DetectorConfig(**{**asdict(SMALL), "frozen_stages": 2, "checkpointing": True}))
    other.load_state_dict(plain.state_dict())
    image, wanted = noise(64, 80), target((5, 5, 40, 30))
    losses = []
    for model in (plain, other):
        torch.manual_seed(2)
        loss = sum(model.train()([image], [wanted]).values())
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    frozen = {name for name, p in other.named_parameters() if not p.requires_grad}
    for part in (".stem.", ".position.", ".stages.0.", ".stages.1."):
        assert any(part in name for name in frozen)
    assert all(".stages.2." not in name and ".stages.3." not in name and "fpn" not in name for name in frozen)
    gradients = dict(plain.named_parameters())
    for name, p in other.named_parameters():
        assert (p.grad is None) == (name in frozen)
        if p.grad is not None:
            assert torch.allclose(p.grad, gradients[name].grad, atol=1e-6)


def test_layer_decay_slows_the_backbone_layer_by_layer_and_nothing_else():
    model = small()
    optimizer = make_optimizer(model, TrainConfig(layer_decay=0.5))
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    names = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert all(value == 1 for name, value in names.items() if "pyramid.body" not in name)
    body = backbone_of(model)
    layers = [scale[id(stage.layers[i].norm1.weight)] for stage in body.stages for i in range(len(stage.layers))]
    assert layers == sorted(layers)
    assert len(set(layers)) == len(layers) == 12
    assert scale[id(body.stem.proj.weight)] < layers[0] < layers[-1] < 1
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(body.position.weight)] == 0
    assert decay[id(body.stem.proj.weight)] > 0


# checkpoints ---------------------------------------------------------------------------------------------------------
def save(model, path, network=NETWORK, image=IMAGE, classes=("ant", "bee", "cat")):
    said = metadata(
        "detection", network, image, list(classes), backbone_of(model), detector=asdict(SMALL), category_ids=[4, 7, 9]
    )
    save_weights(path, model, said)
    return path


@pytest.mark.parametrize("masks", [True, False])
def test_load_detector_gives_the_network_back(tmp_path, masks):
    image = DetectionConfig(size=64, longest=96, masks=masks)
    model = small(image).eval()
    loaded = load_detector(save(model, tmp_path / "best.safetensors", image=image))
    assert (loaded.classes, loaded.category_ids, loaded.image) == (["ant", "bee", "cat"], [4, 7, 9], image)
    picture = noise(70, 50)
    for name, value in detect(model, [picture])[0].items():
        assert torch.equal(value, detect(loaded.model, [picture])[0][name])


def test_a_classifier_gives_its_backbone_and_its_bridges_only_if_asked(tmp_path):
    network = ModelConfig(name="sola_nano", dims=(8, 16, 32, 32), bridges="paper")
    classifier = build_model(network, 5, 32)
    file = tmp_path / "best.safetensors"
    save_weights(file, classifier, metadata("classification", network, IMAGE, list("abcde"), classifier))
    model = small()
    with pytest.raises(ValueError, match="drop_bridges"):
        start_detector(model, file, ["x"], False)
    said = start_detector(model, file, ["x"], True)
    assert "bridges dropped" in said
    assert "position embedding interpolated" in said
    body = backbone_of(model)
    assert torch.equal(body.stages[2].layers[1].norm1.weight, classifier.stages[2].layers[1].norm1.weight)
    assert torch.equal(body.stem.proj.weight, classifier.stem.proj.weight)
    bridged = small(network=network)
    start_detector(bridged, file, ["x"], False)
    own = dict(backbone_of(bridged).named_parameters())
    theirs = dict(classifier.named_parameters())
    bridges = [name for name in own if ".bridges." in name]
    assert bridges
    assert all(torch.equal(own[name], theirs[name]) for name in bridges)
    wrong = small(network=ModelConfig(name="sola_nano", dims=(16, 16, 32, 32)))
    with pytest.raises(ValueError, match="does not fit"):
        start_detector(wrong, file, ["x"], True)


def test_a_detector_gives_all_but_what_depends_on_the_classes(tmp_path):
    file = save(small(), tmp_path / "best.safetensors")
    same, other = small(), small(classes=2)
    start_detector(same, file, ["ant", "bee", "cat"], False)
    assert all(
        torch.equal(a, b)
        for a, b in zip(same.state_dict().values(), load_detector(file).model.state_dict().values(), strict=True)
    )
    fresh = other.roi_heads.box_predictor.cls_score.weight.clone()
    assert "newly initialised" in start_detector(other, file, ["ant", "gnu"], False)
    assert torch.equal(other.roi_heads.box_predictor.cls_score.weight, fresh)
    assert torch.equal(other.roi_heads.box_head.fc6.weight, same.roi_heads.box_head.fc6.weight)


def test_another_network_of_timm_detects():
    model = small(network=ModelConfig(name="resnet18"))
    losses = model.train()([noise(64, 80)], [target((5, 5, 40, 30))])
    assert all(torch.isfinite(loss) for loss in losses.values())
    with pytest.raises(ValueError, match="cannot be the backbone"):
        small(network=ModelConfig(name="sola_nano", patch_size=2))
    with pytest.raises(ValueError, match="cannot be the backbone"):
        small(network=ModelConfig(name="sola_nano", schedule="LLLL", dims=(32,), patch_size=16))


def test_settings_that_are_wrong():
    for name, value in (("channels", 0), ("score_threshold", 2), ("anchor_scale", 0), ("max_detections", 0)):
        with pytest.raises(ValueError, match=name):
            DetectorConfig(**{name: value})
