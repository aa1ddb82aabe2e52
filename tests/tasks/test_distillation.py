# SPDX-License-Identifier: Apache-2.0
"""Distillation: agreement has no loss, only the student learns, and both networks get the same images."""

import copy

import numpy as np
import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

from sola_vision.data import ImageConfig
from sola_vision.tasks import DistillConfig, ModelConfig, build_model
from sola_vision.tasks.distillation import (
    Distillation,
    Student,
    feature_loss,
    find_columns,
    map_levels,
    pair_maps,
    soft_loss,
)
from sola_vision.tasks.teacher import Teacher

IMAGE = ImageConfig(size=32, mixup=0.0, cutmix=0.0, smoothing=0.0)
NAMES = ["ant", "bee", "cat", "dog", "emu"]


def _network(schedule="L/S", dims=(8, 32), classes=5, seed=0):
    torch.manual_seed(seed)
    return build_model(ModelConfig(name="sola_nano", schedule=schedule, dims=dims, drop_path_rate=0.0), classes, 32)


def _teacher(network, classes=NAMES, size=None, normalisation=(IMAGE.mean, IMAGE.std)):
    return Teacher(network, "teacher", classes, size, normalisation, IMAGE)


def _lesson(student, network, config=None, image=IMAGE, **changes):
    """The model and the task of a student and a teacher, as `sola train` creates them."""
    teacher = _teacher(network, **changes)
    config = config or DistillConfig()
    columns, _ = find_columns(config.targets, teacher, NAMES)
    mine, theirs = (map_levels(net, "it", 32) for net in (student, network))
    pairs = pair_maps([stride for stride, _ in mine], [stride for stride, _ in theirs])
    model = Student(student, [a for a, _ in pairs], [(mine[a][1], theirs[b][1]) for a, b in pairs])
    return model.train(), Distillation(5, image, teacher, config, columns, [b for _, b in pairs])


def _batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 3, 32, 32, generator=generator), torch.arange(6) % 5


# agreement -----------------------------------------------------------------------------------------------------------
def test_a_teacher_equal_to_the_student_costs_nothing_and_pulls_nowhere():
    network = _network()
    model, task = _lesson(network, copy.deepcopy(network), DistillConfig(target_weight=1.0))
    for projection in model.projections:
        nn.init.dirac_(projection.weight)
        nn.init.zeros_(projection.bias)
    loss, parts = task.loss(model, _batch())
    assert abs(parts["targets"].item()) < 1e-6
    assert parts["features"].item() < 1e-10
    loss.backward()
    assert all(p.grad.abs().max() < 1e-4 for p in network.parameters() if p.grad is not None)
    other, task = _lesson(network, _network(seed=1), DistillConfig(target_weight=1.0))
    _, parts = task.loss(other, _batch())
    assert parts["targets"].item() > 1e-4
    assert parts["features"].item() > 0.5


def test_the_loss_is_the_sum_of_its_parts():
    config = DistillConfig(target_weight=0.3, temperature=3.0, feature_weight=0.7)
    model, task = _lesson(_network(), _network(seed=1), config)
    loss, parts = task.loss(model, batch := _batch())
    assert parts.keys() == {"labels", "targets", "features"}
    expected = 0.7 * parts["labels"] + 0.3 * parts["targets"] + 0.7 * parts["features"]
    assert torch.allclose(loss, expected)
    assert torch.allclose(parts["labels"], nn.functional.cross_entropy(model(batch[0])[0], batch[1]))


@pytest.mark.parametrize("family", ["sola_nano", "resnet10t"])
def test_gradients_reach_student_and_projections_and_never_the_teacher(family):
    # batch normalisation would move in a teacher that is not in evaluation mode
    teacher = _network(seed=1) if family == "sola_nano" else timm.create_model(family, num_classes=5)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    model, task = _lesson(_network("L/L/S/S", (8, 8, 32, 32)), teacher)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        optimizer.zero_grad()
        task.loss(model, _batch(step))[0].backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
        assert all(projection.weight.grad.abs().sum() > 0 for projection in model.projections)
        optimizer.step()
    assert all(p.grad is None for p in teacher.parameters())
    assert [name for name, value in teacher.state_dict().items() if not torch.equal(value, before[name])] == []
    assert not any("teacher" in name for name in model.state_dict())


def test_training_brings_the_student_nearer():
    model, task = _lesson(_network(), _network(seed=1), DistillConfig(target_weight=1.0))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    seen = []
    for _ in range(20):
        optimizer.zero_grad()
        loss, parts = task.loss(model, _batch())
        loss.backward()
        optimizer.step()
        seen.append((parts["targets"].item(), parts["features"].item()))
    assert seen[-1][0] < 0.1 * seen[0][0]
    assert seen[-1][1] < 0.7 * seen[0][1]


def test_checkpointed_gradients_are_the_same():
    model, task = _lesson(_network(), _network(seed=1))
    task.loss(model, _batch())[0].backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.network.set_grad_checkpointing()
    task.loss(model, _batch())[0].backward()
    assert all(torch.equal(p.grad, grad) for p, grad in zip(model.parameters(), plain, strict=True))


# targets -------------------------------------------------------------------------------------------------------------
def _logits(seed):
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_soft_loss_is_the_divergence_of_softened_probabilities(temperature):
    student, teacher = _logits(0), _logits(1)
    p, q = (np.exp(x.numpy() / temperature) for x in (teacher, student))
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    expected = temperature**2 * (p * np.log(p / q)).sum(1).mean()
    assert soft_loss(student, teacher, temperature).item() == pytest.approx(expected)
    # scaled logits at a scaled temperature: only the factor T^2 remains
    hotter = soft_loss(temperature * student, temperature * teacher, temperature)
    assert hotter.item() == pytest.approx(temperature**2 * soft_loss(student, teacher, 1.0).item())


def test_the_factor_keeps_the_gradient_as_the_temperature_grows():
    student, teacher = _logits(0).requires_grad_(), _logits(1)
    # arXiv 1503.02531, eq. 4: at high temperatures it is the difference of the centred logits divided by their number
    centred = [x.detach() - x.detach().mean(1, keepdim=True) for x in (student, teacher)]
    expected = (centred[0] - centred[1]) / 5 / len(teacher)
    for temperature in (1e3, 1e4):
        (gradient,) = torch.autograd.grad(soft_loss(student, teacher, temperature), student)
        assert torch.allclose(gradient, expected, rtol=1e-2, atol=1e-5)


def test_hard_targets_are_the_class_that_the_teacher_sees():
    config = DistillConfig(targets="hard", target_weight=1.0, feature_weight=0.0)
    model, task = _lesson(_network(), teacher := _network(seed=1), config)
    _, parts = task.loss(model, batch := _batch())
    seen = teacher(batch[0]).argmax(1)
    assert torch.allclose(parts["targets"], nn.functional.cross_entropy(model(batch[0])[0], seen))


def test_classes_are_found_by_name_among_more_in_another_order():
    teacher = _network(classes=7, seed=1)
    names = ["gnu", "emu", "dog", "cat", "bee", "ant", "fox"]
    model, task = _lesson(_network(), teacher, DistillConfig(target_weight=1.0), classes=names)
    assert task.columns == [5, 4, 3, 2, 1]
    _, parts = task.loss(model, batch := _batch())
    expected = soft_loss(model(batch[0])[0], teacher(batch[0])[:, [5, 4, 3, 2, 1]], 2.0)
    assert torch.allclose(parts["targets"], expected)


@pytest.mark.parametrize(
    ("classes", "outputs", "targets", "columns", "words"),
    [
        (["cat", "owl"], 2, "auto", None, "the teacher lacks 4 of the data's 5 classes, such as 'ant'"),
        (["cat", "owl"], 2, "soft", "refused", "--distill.targets soft"),
        (None, 5, "auto", None, "--distill.targets soft if they are the data's"),
        (None, 5, "soft", [0, 1, 2, 3, 4], "taken as the data's classes"),
        (None, 9, "auto", None, "9 outputs, but the data has 5 classes: only its feature maps are learned"),
        (None, 9, "hard", "refused", "9 outputs"),
        (None, 0, "auto", None, "no outputs"),
        (NAMES, 5, "none", None, ""),
        (NAMES, 5, "auto", [0, 1, 2, 3, 4], ""),
    ],
)
def test_which_targets_are_learned(classes, outputs, targets, columns, words):
    teacher = _teacher(_network(classes=outputs), classes=classes)
    if columns == "refused":
        with pytest.raises(ValueError, match=words):
            find_columns(targets, teacher, NAMES)
    else:
        found, note = find_columns(targets, teacher, NAMES)
        assert found == columns
        assert words in note


# maps ----------------------------------------------------------------------------------------------------------------
def test_feature_loss_is_one_minus_the_correlation():
    student, teacher = (torch.randn(2, 12, 3, 4, dtype=torch.float64) for _ in range(2))
    pairs = zip(*(x.movedim(1, -1).reshape(-1, 12).numpy() for x in (student, teacher)), strict=True)
    expected = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in pairs])
    assert feature_loss(student, teacher).item() == pytest.approx(expected, rel=1e-4)
    scaled = teacher * torch.rand(2, 1, 3, 4) * 9 + torch.randn(2, 1, 3, 4)
    assert feature_loss(student, scaled).item() == pytest.approx(expected, rel=1e-3)


def _wave(side):
    """A sine over the width, shifted from channel to channel, sampled at the centres of `side` columns."""
    place = (torch.arange(side) + 0.5) / side
    wave = torch.sin(2 * torch.pi * (place + torch.arange(12)[:, None] / 12))
    return wave[None, :, None, :].expand(1, 12, side, side)


@pytest.mark.parametrize(("mine", "theirs"), [(8, 16), (7, 16), (16, 8), (8, 14)])
def test_maps_of_another_grid_are_resampled(mine, theirs):
    assert feature_loss(_wave(mine), _wave(theirs)).item() < 0.02
    assert feature_loss(_wave(mine), _wave(theirs).flip(3)).item() > 0.5


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ([4, 8, 16, 32], [4, 8, 16, 32], [(0, 0), (1, 1), (2, 2), (3, 3)]),
        ([4, 8, 16, 32], [2, 4, 8, 16, 32], [(0, 1), (1, 2), (2, 3), (3, 4)]),
        ([4, 8, 16, 32], [16] * 12, [(3, 11)]),
        ([16], [4, 8, 16, 32], [(0, 3)]),
        ([16] * 3, [16] * 5, [(2, 4)]),
        ([2, 4, 8, 16], [4, 8, 16, 32], [(1, 0), (2, 1), (3, 3)]),
        ([4, 8, 16, 32], [8, 16], [(1, 0), (3, 1)]),
    ],
)
def test_maps_are_paired_by_stride_and_the_last_with_the_last(student, teacher, pairs):
    assert pair_maps(student, teacher) == pairs


def test_a_network_without_maps_says_so():
    with pytest.raises(ValueError, match="the teacher it has no feature maps"):
        map_levels(nn.Sequential(nn.Flatten()), "the teacher it", 32)


# images --------------------------------------------------------------------------------------------------------------
class _Watch(nn.Module):
    """A network that stores the images it was called with."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.num_classes = 5

    def forward(self, images):
        self.images = images.detach()
        return images.mean((2, 3)).repeat(1, 2)[:, :5] * self.scale


def _watched(image=IMAGE, **changes):
    student, network = _Watch(), _Watch()
    task = Distillation(5, image, _teacher(network, **changes), DistillConfig(), list(range(5)), [])
    return Student(student).train(), task, student, network


def test_teacher_sees_the_mixed_image_of_the_student():
    model, task, student, network = _watched(ImageConfig(size=32))
    np.random.seed(1)
    images, labels = _batch()
    task.loss(model, (images.clone(), labels))
    assert torch.equal(network.images, student.images)
    assert not torch.equal(network.images, images)


def test_teacher_sees_its_own_normalisation_and_size():
    model, task, _, network = _watched(size=16, normalisation=((0.5, 0.4, 0.3), (0.25, 0.2, 0.1)))
    pixels = torch.rand(6, 3, 1, 1).expand(6, 3, 32, 32)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGE.mean, IMAGE.std))
    task.loss(model, ((pixels - mean) / std, torch.zeros(6, dtype=torch.long)))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.5, 0.4, 0.3), (0.25, 0.2, 0.1)))
    own = (pixels[..., :16, :16] - mean) / std
    assert network.images.shape == (6, 3, 16, 16)
    assert torch.allclose(network.images, own, atol=1e-5)


def test_half_precision_is_that_of_the_student():
    model, task = _lesson(_network(), _network(seed=1))
    whole, _ = task.loss(model, _batch())
    with torch.autocast("cpu", torch.bfloat16):
        assert task.teacher(_batch()[0])[0].dtype == torch.bfloat16
        half, parts = task.loss(model, _batch())
    assert all(part.dtype == torch.float32 for part in (half, *parts.values()))
    assert half.item() == pytest.approx(whole.item(), rel=0.05)


# evaluation and the optimiser ----------------------------------------------------------------------------------------
def test_evaluation_reports_the_top1_of_the_teacher_and_runs_it_once():
    model, task = _lesson(_network(), teacher := _network(seed=1))
    batches = [_batch(seed) for seed in range(3)]
    metrics = task.evaluate(model.eval(), batches)
    right = sum((teacher(images).argmax(1) == labels).sum().item() for images, labels in batches)
    student = sum((model(images).argmax(1) == labels).sum().item() for images, labels in batches)
    assert metrics["teacher_top1"] == pytest.approx(100 * right / 18)
    assert metrics["top1"] == pytest.approx(100 * student / 18)
    task.teacher.forward = None  # type: ignore[method-assign]  # a call of it fails
    assert task.evaluate(model, batches) == metrics


def test_evaluation_of_a_teacher_of_other_classes_is_the_students():
    model, task = _lesson(_network(), _network(seed=1), classes=["owl"] * 5)
    assert task.evaluate(model.eval(), [_batch()]).keys() == {"top1", "top5", "loss"}


def test_the_optimiser_treats_the_network_as_if_it_were_alone():
    network = _network()
    model, _ = _lesson(network, _network(seed=1))
    assert model.no_weight_decay() == {"network.position.weight"}
    alone = group_parameters(network, network.group_matcher(), reverse=True)
    together = group_parameters(model, model.group_matcher(), reverse=True)
    assert {name: together[f"network.{name}"] for name in alone} == alone
    projections = {layer for name, layer in together.items() if name.startswith("projections")}
    assert projections == {max(together.values())}


def test_layer_decay_of_a_network_without_groups_says_so():
    with pytest.raises(ValueError, match=r"layer_decay needs a network with group_matcher.*Flatten lacks"):
        Student(nn.Flatten()).group_matcher()


@pytest.mark.parametrize(
    "field",
    [
        *({"target_weight": 1.5}, {"target_weight": float("nan")}),
        *({"temperature": 0.0}, {"temperature": float("inf")}),
        *({"feature_weight": -1.0}, {"feature_weight": float("inf")}),
    ],
    ids=str,
)
def test_numbers_without_sense_are_refused(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        DistillConfig(**field)
