# SPDX-License-Identifier: Apache-2.0
"""The images, their order and their augmentation depend on the seed only, not on the process that loads them."""

import random
from collections import namedtuple

import numpy as np
import pytest
import torch
from tiny import Images, settings

from sola_vision.engine import EvaluationBatches, World, to_device
from sola_vision.engine.loading import MicroBatches, Skipped, micro_batch_size, seed_all, training_batches

CPU = torch.device("cpu")
ONE = World(0, 1, CPU)


def flat(batches):
    return [pair for batch in batches for pair in batch]


def test_an_epoch_is_a_permutation_and_no_two_are_alike():
    order = flat(MicroBatches(60, settings(), ONE, 0, 10))
    first, second = ([index for epoch, index in order if epoch == number] for number in (0, 1))
    assert sorted(first) == sorted(second) == list(range(60))
    assert first != second
    assert order == flat(MicroBatches(60, settings(), ONE, 0, 10))
    assert order != flat(MicroBatches(60, settings(seed=1), ONE, 0, 10))


def test_resuming_skips_what_was_seen():
    whole = list(MicroBatches(60, settings(), ONE, 0, 15))
    assert list(MicroBatches(60, settings(), ONE, 7, 15)) == whole[14:]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_processes_and_micro_batches_share_each_step(accumulate):
    config = settings(accumulate=accumulate)
    alone = flat(MicroBatches(60, settings(accumulate=1), ONE, 0, 10))
    shares = [list(MicroBatches(60, config, World(rank, 2, CPU), 0, 10)) for rank in range(2)]
    for step in range(10):
        together = [pair for share in shares for pair in flat(share[step * accumulate : (step + 1) * accumulate])]
        assert sorted(together) == sorted(alone[step * 12 : (step + 1) * 12])


def test_the_rest_of_an_epoch_is_dropped():
    order = flat(MicroBatches(31, settings(), ONE, 0, 4))
    assert [epoch for epoch, _ in order] == [0] * 24 + [1] * 24


def test_batches_must_divide():
    with pytest.raises(ValueError, match="multiple of 10"):
        micro_batch_size(settings(), World(0, 5, CPU))


def images_of(workers, start=0, bad=()):
    config = settings(workers=workers)
    skipped = Skipped("training", 60, 0.1)
    batches = list(training_batches(Images(bad=bad), config, ONE, start, 6, skipped, None))
    return torch.stack([batch["image"] for batch in batches]), skipped


def test_augmentation_does_not_depend_on_workers_or_on_where_a_run_resumed():
    alone, _ = images_of(0)
    assert torch.equal(images_of(2)[0], alone)
    assert torch.equal(images_of(1, start=2)[0], alone[4:])


@pytest.mark.filterwarnings("error")
def test_more_workers_than_cores_raise_no_warning(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    batches = EvaluationBatches(Images(31), ONE, batch_size=16, workers=2)
    assert len(list(batches)) == 2
    batches.close()
    images_of(2)


def test_loading_leaves_the_global_generators_alone():
    def draw():
        seed_all("test")
        yield
        yield random.random(), np.random.rand(), torch.rand(1).item()

    drawn = draw()
    next(drawn)
    expected = next(drawn)
    drawn = draw()
    next(drawn)
    images_of(0)
    list(EvaluationBatches(Images(), ONE, batch_size=7))
    assert next(drawn) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_replaced_by_the_next(workers):
    images, skipped = images_of(workers, bad=(3, 4, 59))
    assert images.shape == (12, 6, 8)
    assert set(skipped.fresh) == {3, 4, 59}
    good = images_of(0)[0]
    changed = (images != good).any(-1).flatten().nonzero().flatten().tolist()
    order = [pair[1] for pair in flat(MicroBatches(60, settings(), ONE, 0, 6))]
    assert {order[position] for position in changed} == {3, 4, 59}
    # 59 is the last: the next one is the first; both augmented with the seed of (epoch, 0)
    assert torch.equal(images.flatten(0, 1)[order.index(59)], good.flatten(0, 1)[order.index(0)])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_readable_image_once(world):
    seen = []
    for rank in range(world):
        batches = EvaluationBatches(Images(31, bad=[5], train=False), World(rank, world, CPU), batch_size=4)
        seen += [index for batch in batches for index in batch["index"].tolist()]
        assert batches.skipped.fresh == ({5: "image_5.png is broken"} if 5 % world == rank else {})
    assert sorted(seen) == [index for index in range(31) if index != 5]


@pytest.mark.parametrize(("size", "share", "limit"), [(1000, 0.01, 10), (50, 0.01, 1), (50, 0.0, 0), (1000, 0.0, 0)])
def test_how_many_may_be_unreadable(size, share, limit):
    skipped, said = Skipped("training", size, share), []
    for index in range(limit):
        skipped.note([(index, f"file {index}")] * 2)
        skipped.share(said.append)
    assert len(said) == limit
    skipped.note([(limit, "one more")])
    with pytest.raises(ValueError, match=f"{limit + 1} of the {size} training images cannot be read"):
        skipped.share(said.append)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_set_without_a_readable_image_is_refused(workers):
    config, skipped = settings(workers=workers), Skipped("training", 60, 1.0)
    with pytest.raises(ValueError, match=r"none of the 60 training images can be read: .* image_\d+\.png is broken"):
        list(training_batches(Images(bad=range(60)), config, ONE, 0, 6, skipped, None))
    for size in (1, 31):
        images = Images(size, bad=range(size), train=False)
        none = "the only evaluation image cannot" if size == 1 else f"none of the {size} evaluation images can"
        with pytest.raises(ValueError, match=f"{none} be read"):
            list(EvaluationBatches(images, ONE, batch_size=4, workers=workers, max_corrupt=1.0))


def test_to_device_walks_through_containers():
    Pair = namedtuple("Pair", "left right")
    batch = {"a": [torch.zeros(1), "name"], "b": (torch.ones(2), Pair(torch.ones(1), 3))}
    moved = to_device(batch, torch.device("meta"))
    assert moved["a"][0].is_meta
    assert moved["a"][1] == "name"
    assert moved["b"][0].is_meta
    assert isinstance(moved["b"][1], Pair)
    assert moved["b"][1].left.is_meta
    assert moved["b"][1].right == 3
