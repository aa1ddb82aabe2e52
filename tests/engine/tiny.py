# SPDX-License-Identifier: Apache-2.0
"""A run small enough to be killed and compared: seconds on one core, and random in the same places as a real one.

The tests import its pieces; as a script (`python tiny.py FOLDER key=value ... -- FOLDER ...`) it is one process of one
or more runs, which can be killed or started by torchrun: `die=N` is a SIGKILL inside the Nth loss, `term=N` a SIGTERM.
"""

import contextlib
import itertools
import json
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from sola_vision.engine import TrainConfig, all_reduce_sum, distributed, fit

TIMES = ("images_per_second", "seconds")


class Images(torch.utils.data.Dataset):
    """Noisy vectors of three classes, with augmentation from all three generators; some of them may be unreadable."""

    def __init__(self, size=60, bad=(), train=True):
        generator = torch.Generator().manual_seed(size)
        self.labels = torch.arange(size) % 3
        self.values = torch.randn(size, 8, generator=generator) + 2.0 * F.one_hot(self.labels, 8)
        self.bad = set(bad)
        self.train = train

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if index in self.bad:
            raise (OSError if index % 2 else ValueError)(f"image_{index}.png is broken")
        noise = random.random() + np.random.rand() + torch.rand(8) if self.train else 0.0
        return {"image": self.values[index] + noise, "label": self.labels[index], "index": index}


class Net(nn.Module):
    """Dropout needs the global generator, batch normalisation has buffers, `blocks` are units of sharding."""

    def __init__(self, width=32, dropout=0.2, norm=True):
        super().__init__()
        generator = torch.random.get_rng_state()
        torch.manual_seed(0)
        self.stem = nn.Linear(8, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.LayerNorm(width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(2))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 3)
        torch.random.set_rng_state(generator)

    def forward(self, image):
        hidden = self.norm(self.stem(image))
        for block in self.blocks:
            hidden = hidden + self.dropout(block(hidden))
        return self.head(hidden)


class Classify:
    metric = "top1"

    def __init__(self, die=None, term=None, nan=None, mix=True):
        self.die, self.term, self.nan, self.mix = die, term, nan, mix
        self.calls = 0
        self.seen = []

    def loss(self, model, batch):
        self.calls += 1
        self.seen.append(batch["index"].tolist())
        if self.calls == self.die:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.calls == self.term:
            os.kill(os.getpid(), signal.SIGTERM)
        image = batch["image"] * (np.random.beta(8, 1) if self.mix else 1.0)  # same generator as timm's Mixup
        loss = F.cross_entropy(model(image), batch["label"])
        if self.calls == self.nan:
            loss = loss * float("nan")
        return loss, {"half": loss.detach() / 2}

    def evaluate(self, model, batches):
        counts = torch.zeros(2)
        for batch in batches:
            right = model(batch["image"]).argmax(1) == batch["label"]
            counts += torch.tensor([right.sum(), len(right)])
        right, total = all_reduce_sum(counts).tolist()
        return {"top1": 100 * right / max(total, 1), "images": total}


def settings(**changes):
    """60 images in batches of 12: five steps an epoch, of two micro-batches each."""
    small = {
        "epochs": 3,
        "batch_size": 12,
        "accumulate": 2,
        "lr": 0.05,
        "warmup_epochs": 1,
        "ema": 0.9,
        "workers": 0,
        "save_steps": 4,
        "log_every": 3,
        "device": "cpu",
    }
    return TrainConfig(**(small | changes))


def train(folder, task=None, model=None, bad=(), bad_val=(), resume=False, **changes):
    return fit(
        task or Classify(),
        model or Net(),
        Images(bad=bad),
        Images(31, bad=bad_val, train=False),
        settings(**changes),
        folder,
        resume=resume,
        metadata={"classes": "abc"},
    )


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_same_run(one, other):
    """Weights, moving average, optimiser, best weights and metrics, bit by bit."""
    for file in ("last/state.safetensors", "best.safetensors"):
        mine, theirs = load_file(one / file), load_file(other / file)
        assert mine.keys() == theirs.keys()
        assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []
    assert metrics(one) == metrics(other)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    assert summaries[0]["best"] == summaries[1]["best"]


def main(folder, *arguments):
    given = {key: json.loads(value) for key, value in (argument.split("=", 1) for argument in arguments)}
    resume, width, bad = given.pop("resume", False), given.pop("width", 32), given.pop("bad", [])
    plain = given.pop("plain", False)  # without anything that differs between one process and two
    task = Classify(given.pop("die", None), given.pop("term", None), mix=not plain)
    model = Net(width, dropout=0.0, norm=False) if plain else Net(width)
    torch.set_num_threads(1)
    train, val = Images(bad=bad), Images(31, train=False)
    fit(task, model, train, val, settings(**given), Path(folder), resume=resume, metadata={"classes": "abc"})


if __name__ == "__main__":
    runs = [list(words) for is_run, words in itertools.groupby(sys.argv[1:], lambda word: word != "--") if is_run]
    with distributed("cpu"):  # several runs with one group of processes
        for run in runs:
            stops = len(runs) > 1 and any(word.startswith("term=") for word in run)
            with contextlib.suppress(KeyboardInterrupt) if stops else contextlib.nullcontext():
                main(*run)
