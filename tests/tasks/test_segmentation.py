# SPDX-License-Identifier: Apache-2.0
"""The confusion matrix against ADE20K's official script, its treatment of absent classes, the loss, and pictures."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from sola_vision.data import IGNORED
from sola_vision.tasks.label_pictures import Example, draw_worst
from sola_vision.tasks.pictures import draw_confusion
from sola_vision.tasks.segmentation import PixelCounts, Segmentation, share_right


def official(predictions, labels, num_classes):
    """mIoU and pixel accuracy as ADE20K's evaluation code computes them; 0 is unlabelled, the classes are 1..N.

    After intersectionAndUnion.m, pixelAccuracy.m and demoEvaluation.m of CSAILVision/sceneparsing.
    """
    inter, union = np.zeros(num_classes), np.zeros(num_classes)
    correct = labelled = 0
    for predicted, label in zip(predictions, labels, strict=True):
        predicted = predicted * (label > 0)
        bins = {"bins": num_classes, "range": (1, num_classes + 1)}
        here = np.histogram(predicted * (predicted == label), **bins)[0]
        inter += here
        union += np.histogram(predicted, **bins)[0] + np.histogram(label, **bins)[0] - here
        correct += ((predicted == label) & (label > 0)).sum()
        labelled += (label > 0).sum()
    return np.mean(inter / (union + np.spacing(1))), correct / labelled


def counted(predictions, labels, num_classes):
    """The same by PixelCounts, whose classes are 0..N-1."""
    counts = PixelCounts.of(num_classes)
    for predicted, label in zip(predictions, labels, strict=True):
        counts.add(torch.tensor(predicted - 1), torch.tensor(label - 1))
    return counts


@pytest.mark.parametrize("seed", range(4))
def test_numbers_are_those_of_the_official_script(seed):
    rng = np.random.default_rng(seed)
    num_classes, used = 20, 9 + seed
    labels = [rng.integers(0, used, (13 + k, 17)) for k in range(3)]
    # partly wrong, partly without a class, and with classes that are not in the truth
    predictions = [np.where(rng.random(x.shape) < 0.5, x, rng.integers(0, used + 2, x.shape)) for x in labels]
    metrics = counted(predictions, labels, num_classes).metrics
    miou, accuracy = official(predictions, labels, num_classes)
    assert metrics["miou_all"] == pytest.approx(100 * miou, abs=1e-10)
    assert metrics["pixel_accuracy"] == pytest.approx(100 * accuracy, abs=1e-10)
    named = [np.where(label > 0, x, 0) for x, label in zip(predictions, labels, strict=True)]
    present = np.unique(np.concatenate([x.ravel() for x in (*named, *labels)]))
    assert metrics["classes_present"] == (present > 0).sum()
    assert metrics["miou"] * metrics["classes_present"] == pytest.approx(metrics["miou_all"] * num_classes)


def test_perfect_predictions_and_absent_classes():
    label = np.arange(1, 16).repeat(4).reshape(6, 10)
    metrics = counted([label], [label], 150).metrics
    assert metrics["miou"] == 100  # over the 15 classes that occur
    assert metrics["miou_all"] == pytest.approx(100 * 15 / 150)  # over all
    assert (metrics["mean_accuracy"], metrics["pixel_accuracy"], metrics["classes_present"]) == (100, 100, 15)


def test_a_class_that_is_only_predicted_lowers_the_mean():
    counts = PixelCounts.of(4)
    counts.add(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 1]))
    assert counts.iou == pytest.approx([1, 0.5, 0, np.nan], nan_ok=True)
    assert counts.accuracy == pytest.approx([1, 0.5, np.nan, np.nan], nan_ok=True)
    assert counts.precision == pytest.approx([1, 1, 0, np.nan], nan_ok=True)
    assert counts.metrics["miou"] == pytest.approx(50)
    assert counts.metrics["mean_accuracy"] == pytest.approx(75)


def test_ignored_pixels_count_nowhere():
    torch.manual_seed(0)
    truth = torch.randint(0, 5, (30, 30))
    predicted = torch.randint(0, 5, (30, 30))
    hidden = torch.rand(30, 30) < 0.3
    one, other = PixelCounts.of(5), PixelCounts.of(5)
    one.add(predicted, truth.masked_fill(hidden, IGNORED))
    other.add(predicted.masked_fill(hidden, 3)[~hidden], truth[~hidden])
    assert torch.equal(one.confusion, other.confusion)
    assert share_right(predicted, truth.masked_fill(hidden, IGNORED)) == one.metrics["pixel_accuracy"]
    assert np.isnan(share_right(predicted, torch.full_like(truth, IGNORED)))
    nothing = PixelCounts.of(5)
    nothing.add(predicted, torch.full_like(truth, IGNORED))
    assert np.isnan(nothing.metrics["miou"])


def test_counts_of_parts_add_up():
    torch.manual_seed(0)
    pairs = [(torch.randint(-1, 5, (9, 7)), torch.randint(-1, 5, (9, 7))) for _ in range(6)]
    whole, parts = PixelCounts.of(5), [PixelCounts.of(5) for _ in range(2)]
    for index, pair in enumerate(pairs):
        whole.add(*pair)
        parts[index % 2].add(*pair)
    assert torch.equal(whole.confusion, sum(part.confusion for part in parts))
    assert whole.confusion.sum() == sum((truth != IGNORED).sum() for _, truth in pairs)


class Two(nn.Module):
    """Two heads, as UPerNet has in training."""

    def __init__(self):
        super().__init__()
        self.main, self.auxiliary = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x):
        return (self.main(x), self.auxiliary(x)) if self.training else self.main(x)


def test_the_loss_is_a_mean_over_pixels_that_count():
    torch.manual_seed(0)
    model, images = Two(), torch.randn(2, 3, 8, 8)
    classes = torch.randint(-1, 4, (2, 8, 8)).short()
    loss, parts = Segmentation(4, auxiliary_weight=0.3).loss(model, (images, classes))
    expected = [nn.functional.cross_entropy(x, classes.long(), ignore_index=-1) for x in model(images)]
    torch.testing.assert_close(parts["main"], expected[0])
    torch.testing.assert_close(loss, expected[0] + 0.3 * expected[1])


def test_a_batch_without_a_pixel_that_counts_teaches_nothing():
    model = Two()
    loss, _ = Segmentation(4).loss(model, (torch.randn(2, 3, 8, 8), torch.full((2, 8, 8), IGNORED)))
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in model.parameters())


def test_a_batch_of_one_is_refused():
    with pytest.raises(ValueError, match=r"batch size per process must be at least 2 .*got 1"):
        Segmentation(4).check_batch(1)


def test_evaluation_takes_images_of_any_size():
    model = Two().eval()
    samples = [(torch.randn(3, 8, 12), torch.randint(-1, 4, (16, 25)).short()) for _ in range(3)]
    metrics = Segmentation(4).evaluate(model, [samples[:2], samples[2:]])
    counts = PixelCounts.of(4)
    for image, truth in samples:
        logits = nn.functional.interpolate(model(image[None]), size=truth.shape, mode="bilinear", align_corners=False)
        counts.add(logits[0].argmax(0), truth)
    assert metrics == counts.metrics


# pictures -------------------------------------------------------------------------------------------------------------
def test_the_worst_images_name_the_classes_that_occur(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    truth = np.array([[0, 0, 0, IGNORED]])
    names = ["ground", "absent", "_$x_$", *(f"class {index}" for index in range(60))]
    draw_worst([Example("a", None, truth, np.array([[0, 0, 2, 2]]), 50.0)], names, tmp_path / "worst.png")
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["ground", r"_\$x_\$"]
    many = np.arange(60)[None] + 3
    draw_worst([Example("a", None, many, many, 100.0)], names, tmp_path / "worst.png")
    assert figures[1].legends[0].get_texts()[-1].get_text() == "and 36 more"


@pytest.mark.parametrize("number", [2, 40, 41, 150])
def test_a_confusion_matrix_of_any_size_has_names(tmp_path, monkeypatch, number):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    names = [f"name {index} " + 40 * "x" for index in range(number)]
    draw_confusion(torch.eye(number), names, tmp_path / "confusion.png")
    axes = figures[0].axes[0]
    shown = [text.get_text() for text in axes.get_yticklabels()]
    assert 2 <= len(shown) <= 40
    for place, text in zip(axes.get_yticks(), shown, strict=True):
        assert text.startswith(f"name {place:.0f} ")
        assert len(text) == 28
