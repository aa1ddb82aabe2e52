# SPDX-License-Identifier: Apache-2.0
"""Tally against plain formulas and scikit-learn, and the loss with and without mixing."""

import os
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score
from torch import nn

from sola_vision.data import ImageConfig
from sola_vision.tasks import Classification, Tally


def _answers(images=50, classes=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes - 1, (images,), generator=generator)  # the last class has no image
    logits = torch.randn(images, classes, generator=generator) + 1.5 * nn.functional.one_hot(labels, classes)
    return logits, labels


@pytest.mark.parametrize("classes", [2, 5, 9])
@pytest.mark.parametrize("parts", [1, 7])
def test_tally_agrees_with_scikit_learn(classes, parts):
    logits, labels = _answers(classes=classes)
    tally = Tally.of(classes)
    for some, true in zip(logits.chunk(parts), labels.chunk(parts), strict=True):
        tally.add(some, true)
    names = list(range(classes))
    assert np.array_equal(tally.confusion.numpy(), confusion_matrix(labels, logits.argmax(1), labels=names))
    assert torch.equal(tally.confusion.sum(1), torch.bincount(labels, minlength=classes))
    probability = logits.double().softmax(1).numpy()
    top5 = 1.0 if classes <= 5 else top_k_accuracy_score(labels, probability, k=5, labels=names)
    metrics = tally.metrics
    assert metrics["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert metrics["top5"] == pytest.approx(100 * top5)
    assert metrics["loss"] == pytest.approx(log_loss(labels, probability, labels=names), rel=1e-5)
    assert tally.images == len(labels)


def test_tally_of_half_precision_is_that_of_float():
    logits, labels = _answers()
    half, whole = Tally.of(9), Tally.of(9)
    half.add(logits.bfloat16(), labels)
    whole.add(logits.bfloat16().float(), labels)
    assert half.metrics == whole.metrics


def test_tally_without_images():
    assert Tally.of(3).metrics == {"top1": 0.0, "top5": 0.0, "loss": 0.0}


def test_tally_reduced_alone_is_itself_to_the_bit():
    tally = Tally.of(9)
    tally.add(*_answers())
    tally.loss = 0.1  # not representable in float32
    alone = tally.reduced(torch.device("cpu"))
    assert (alone.top5, alone.loss) == (tally.top5, tally.loss)
    assert torch.equal(alone.confusion, tally.confusion)


def _process(rank, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    logits, labels = _answers()
    tally = Tally.of(9)
    tally.add(logits[rank::2], labels[rank::2])
    total = tally.reduced(torch.device("cpu"))
    torch.save({"confusion": total.confusion, **total.metrics}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_sum_up(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_process, (port, str(tmp_path)), nprocs=2, start_method="fork")
    whole = Tally.of(9)
    whole.add(*_answers())
    for rank in range(2):
        total = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(total["confusion"], whole.confusion)
        assert {name: total[name] for name in whole.metrics} == pytest.approx(whole.metrics)


class _Record(nn.Module):
    """Store the input; the logits are the first pixels of the images."""

    def forward(self, images):
        self.images = images
        return images[:, 0, 0, :5] * 3


def _plain(**changes):
    return ImageConfig(size=32, **({"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0} | changes))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_without_mixing_smooths_labels(smoothing):
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    loss, parts = Classification(5, _plain(smoothing=smoothing)).loss(model := _Record(), (images, labels))
    log_probability = (images[:, 0, 0, :5] * 3).log_softmax(1)
    target = torch.full((6, 5), smoothing / 5)
    target[torch.arange(6), labels] += 1 - smoothing
    assert torch.allclose(loss, -(target * log_probability).sum(1).mean())
    assert model.images is images
    assert parts == {}


def test_loss_with_mixup_is_cross_entropy_with_the_mixed_targets():
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    task = Classification(5, _plain(mixup=0.8, smoothing=0.1))
    np.random.seed(3)
    loss, _ = task.loss(model := _Record(), (images.clone(), labels))
    # timm mixes an image with the one at the batch's other end; their shares can be read from the pixels
    other = images.flip(0)
    share = ((model.images - other) * (images - other)).sum() / ((images - other) ** 2).sum()
    assert 0 < share < 1
    assert torch.allclose(model.images, share * images + (1 - share) * other, atol=1e-5)
    hot = nn.functional.one_hot(labels, 5) * 0.9 + 0.1 / 5
    target = share * hot + (1 - share) * hot.flip(0)
    expected = -(target * (model.images[:, 0, 0, :5] * 3).log_softmax(1)).sum(1).mean()
    assert torch.allclose(loss, expected, atol=1e-5)


def test_odd_batch_is_refused_only_where_images_are_mixed():
    with pytest.raises(ValueError, match="batch of 7"):
        Classification(5, _plain(mixup=0.8)).check_batch(7)
    with pytest.raises(ValueError, match="batch of 3"):
        Classification(5, _plain(cutmix=1.0)).loss(_Record(), (torch.zeros(3, 3, 8, 8), torch.zeros(3).long()))
    Classification(5, _plain(mixup=0.8, mixup_prob=0.0)).check_batch(7)


def test_evaluate_counts_every_batch():
    logits, labels = _answers(classes=5)
    images = torch.zeros(50, 3, 8, 8)
    images[:, 0, 0, :5] = logits / 3

    class Model(_Record):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

    batches = list(zip(images.split(16), labels.split(16), strict=True))
    metrics = Classification(5, _plain()).evaluate(Model(), batches)
    assert metrics["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
