# SPDX-License-Identifier: Apache-2.0
"""Data loading: batches on the device that depend neither on the number of workers nor on where a run was resumed.

The order of images is a function of (seed, epoch), the augmentation of an image a function of (seed, epoch, index).
Resuming therefore only means starting at another step, and no random state is saved. An image that cannot be read
(OSError or ValueError) is replaced by the next one in training and skipped in evaluation.
"""

import hashlib
import random
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ..wording import amount
from .config import TrainConfig
from .distributed import World, gather_objects

Failures = list[tuple[int, str]]  # (index, error message)
Collate = Callable[[list[Any]], Any]

_MISSING = object()


def seed_from(*key: int | str) -> int:
    """Return a 63-bit seed derived from `key`, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


def seed_all(*key: int | str) -> None:
    """Seed every global generator, including those of the accelerators."""
    seed = seed_from(*key)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.manual_seed(seed)


@contextmanager
def _seeded(*key: int | str) -> Iterator[None]:
    """Seed the CPU generators (timm's transforms use all three) within this context and restore them afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = seed_from(*key)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class Skipped:
    """The unreadable images of a dataset, and the number of them that a run tolerates."""

    def __init__(self, what: str, size: int, max_corrupt: float, known: dict[int, str] | None = None) -> None:
        self.what = what
        self.size = size
        self.max_corrupt = max_corrupt
        # a single bad file is tolerated in a small dataset too, unless max_corrupt is 0
        limit = max(int(max_corrupt * size), 1 if max_corrupt > 0 else 0)
        # but at least one image has to be readable
        self.limit = max(min(limit, size - 1), 0)
        self.known = dict(known or {})  # the same on every process
        self.fresh: dict[int, str] = {}  # recorded by this process and not yet shared

    def note(self, failures: Failures) -> None:
        """Record failures of this process."""
        self.fresh.update((index, text) for index, text in failures if index not in self.known)

    def share(self, log: Callable[[str], None]) -> None:
        """Log each new failure of any process once, then `check`. Collective: every process must call it."""
        for index, text in sorted(gather_objects(list(self.fresh.items()))):
            if index not in self.known:
                self.known[index] = text
                log(f"skipped {self.what} image {index}: {text}")
        self.fresh.clear()
        self.check()

    def check(self) -> None:
        """Raise ValueError if more images than the limit are unreadable."""
        bad = self.known | self.fresh
        if len(bad) > self.limit:
            first = f"repair or remove them; the first: {next(iter(bad.values()))}"
            if len(bad) == self.size:
                none = "the only" if self.size == 1 else f"none of the {self.size}"
                verb = "image cannot" if self.size == 1 else "images can"
                raise ValueError(f"{none} {self.what} {verb} be read: {first}")
            raise ValueError(
                f"{len(bad)} of the {self.size} {self.what} images cannot be read, more than the {self.limit} that "
                f"may be skipped ({self.max_corrupt:g} of a dataset; only train.max_corrupt changes this): {first}"
            )


class _Readable(Dataset[tuple[Any, Failures]]):
    """Dataset wrapper: (epoch, index) -> (sample, failures), trying the next images after one that is unreadable."""

    def __init__(self, base: Dataset[Any], seed: int, tries: int) -> None:
        self.base = base
        self.seed = seed
        self.tries = tries

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, Failures]:
        epoch, index = key
        failures: Failures = []
        size = len(self.base)  # type: ignore[arg-type]  # torch's Dataset does not declare __len__
        for candidate in ((index + offset) % size for offset in range(min(self.tries, size))):
            try:
                with _seeded(self.seed, epoch, candidate):
                    return self.base[candidate], failures
            except (OSError, ValueError) as error:
                failures.append((candidate, " ".join(str(error).split()) or type(error).__name__))
        return _MISSING, failures


class _Collate:
    """Collate function: samples -> (batch or None, failures). With `whole` a batch that lacks a sample is None."""

    def __init__(self, collate: Collate | None, whole: bool) -> None:
        self.collate = collate or default_collate
        self.whole = whole

    def __call__(self, items: list[tuple[Any, Failures]]) -> tuple[Any, Failures]:
        samples = [sample for sample, _ in items if sample is not _MISSING]
        complete = len(samples) == len(items) if self.whole else bool(samples)
        return self.collate(samples) if complete else None, [failure for _, some in items for failure in some]


class MicroBatches(Sampler[list[tuple[int, int]]]):
    """Sampler of one process's micro-batches of steps [start, stop), each a list of (epoch, index).

    The incomplete last batch of an epoch is dropped.
    """

    def __init__(self, size: int, config: TrainConfig, world: World, start: int, stop: int) -> None:
        self.size, self.config, self.world, self.start, self.stop = size, config, world, start, stop

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        config, world = self.config, self.world
        count = micro_batch_size(config, world)
        epoch_steps = self.size // config.batch_size
        order: list[int] = []
        ordered = -1
        for step in range(self.start, self.stop):
            epoch, within = divmod(step, epoch_steps)
            if epoch != ordered:
                generator = torch.Generator().manual_seed(seed_from(config.seed, "order", epoch))
                order, ordered = torch.randperm(self.size, generator=generator).tolist(), epoch
            for micro in range(config.accumulate):
                first = within * config.batch_size + (micro * world.size + world.rank) * count
                yield [(epoch, index) for index in order[first : first + count]]

    def __len__(self) -> int:
        return (self.stop - self.start) * self.config.accumulate


def micro_batch_size(config: TrainConfig, world: World) -> int:
    """Return the number of images that one process passes through the model at once."""
    parts = config.accumulate * world.size
    if config.batch_size % parts:
        raise ValueError(
            f"batch_size={config.batch_size} must be a multiple of {parts}: accumulate={config.accumulate} "
            f"times {amount(world.size, 'process', 'processes')}"
        )
    return config.batch_size // parts


def count_epoch_steps(size: int, config: TrainConfig) -> int:
    """Return the steps of an epoch over `size` images; the incomplete last batch is dropped."""
    if size < config.batch_size:
        images = amount(size, "training image")
        raise ValueError(f"batch_size={config.batch_size} is more than the {images}: lower it")
    return size // config.batch_size


def training_batches(
    dataset: Dataset[Any],
    config: TrainConfig,
    world: World,
    start: int,
    stop: int,
    skipped: Skipped,
    collate: Collate | None,
) -> Generator[Any, None, None]:
    """Yield the micro-batches of steps [start, stop) on the device; workers keep prefetching across epochs."""
    sampler = MicroBatches(skipped.size, config, world, start, stop)
    readable = _Readable(dataset, config.seed, tries=skipped.limit + 1)
    batches = iter(_loader(readable, sampler, _Collate(collate, whole=True), config.workers, world.device))
    try:
        for batch, failures in batches:
            skipped.note(failures)
            if batch is None:  # more images in a row than the limit were unreadable, so this process may stop alone
                skipped.check()
            yield to_device(batch, world.device)
    finally:
        _end_workers(batches)


class EvaluationBatches:
    """Batches with every image of a dataset exactly once over all processes, in order; can be iterated repeatedly."""

    def __init__(
        self,
        dataset: Dataset[Any],
        world: World,
        *,
        batch_size: int,
        workers: int = 0,
        seed: int = 0,
        max_corrupt: float = 0.01,
        collate: Collate | None = None,
        known: dict[int, str] | None = None,
    ) -> None:
        size = len(dataset)  # type: ignore[arg-type]  # torch's Dataset does not declare __len__
        self.skipped = Skipped("evaluation", size, max_corrupt, known)
        self.world = world
        keys = [(-1, index) for index in range(world.rank, size, world.size)]
        batches = [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]
        readable = _Readable(dataset, seed, tries=1)
        self._loader = _loader(
            readable, batches, _Collate(collate, whole=False), workers, world.device, keep_workers=True
        )

    def __iter__(self) -> Iterator[Any]:
        for batch, failures in self._loader:
            self.skipped.note(failures)
            if self.world.size == 1:  # several processes check after the evaluation, or some would wait forever
                self.skipped.check()
            if batch is not None:
                yield to_device(batch, self.world.device)

    def close(self) -> None:
        """Shut down the workers, which otherwise wait for the next evaluation."""
        _end_workers(self._loader._iterator)
        self._loader._iterator = None


class _Loader(DataLoader[Any]):
    """DataLoader without torch's warning about more workers than cores: their number is a setting."""

    def check_worker_number_rationality(self) -> None:
        pass


def _loader(
    dataset: Dataset[Any],
    batches: Any,
    collate: _Collate,
    workers: int,
    device: torch.device,
    keep_workers: bool = False,
) -> DataLoader[Any]:
    return _Loader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=keep_workers and workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=_ignore_signals,
        generator=torch.Generator(),  # without it, every new iterator would draw from the global generator
    )


def _end_workers(batches: Any) -> None:
    # otherwise workers live as long as the iterator, and a traceback may keep a reference to it
    if hasattr(batches, "_shutdown_workers"):
        batches._shutdown_workers()


def _ignore_signals(_: int) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group, but the current step still needs its workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def to_device(batch: Any, device: torch.device) -> Any:
    """Move the tensors in nested tuples, lists and dicts to `device`; other values are returned unchanged."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
