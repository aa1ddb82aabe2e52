# SPDX-License-Identifier: Apache-2.0
"""A run: the contents of its folder, resuming after a kill without loss, and how it ends after an error."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tiny import Classify, Images, Net, assert_same_run, metrics, settings, train
from torch import nn

from sola_vision.engine import TrainingStopped, fit, load_weights, read_metadata
from sola_vision.engine import checkpoint as module

TINY = Path(__file__).parent / "tiny.py"


def start(*arguments, torchrun=0):
    """Run tiny.py in one process, or in `torchrun` processes under torchrun."""
    launcher = []
    if torchrun:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={torchrun}", f"--master-port={port}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(
        [sys.executable, *launcher, str(TINY), *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_fit_fills_the_folder(whole_run):
    names = {path.name for path in whole_run.iterdir()}
    assert {name for name in names if not name.startswith("events.")} == {
        "metrics.jsonl",
        "last",
        "best.safetensors",
        "summary.json",
    }
    assert len(names) == 5
    lines = metrics(whole_run)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [3, 6, 9, 12, 15]
    assert {"loss", "half", "lr", "grad_norm", "epoch"} <= lines[0].keys()
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert [line["step"] for line in evaluations] == [5, 10, 15]
    summary = json.loads((whole_run / "summary.json").read_text())
    assert summary["top1"] == evaluations[-1]["top1"]
    assert summary["best"]["top1"] == max(line["top1"] for line in evaluations)
    assert summary["steps"] == 15
    assert {"seconds", "peak_memory_mib", "commit", "hardware", "command", "torch", "images_skipped"} <= summary.keys()
    assert read_metadata(whole_run / "best.safetensors") == {"classes": "abc"}


def test_best_are_the_averaged_weights_that_reached_the_metric(whole_run):
    model = Net()
    assert not load_weights(model, whole_run / "best.safetensors")
    best = json.loads((whole_run / "summary.json").read_text())["best"]
    result = Classify().evaluate(model.eval(), [torch.utils.data.default_collate(list(Images(31, train=False)))])
    assert result["top1"] == best["top1"]
    if best["step"] == 15:
        state = load_file(whole_run / "last/state.safetensors")
        assert torch.equal(state["ema/head.weight"], model.head.weight)
        assert not torch.equal(state["model/head.weight"], model.head.weight)


def test_a_record_is_the_mean_since_the_one_before(whole_run, tmp_path):
    train(tmp_path, log_every=1)
    single = [line["loss"] for line in metrics(tmp_path) if line["kind"] == "train"]
    means = [line["loss"] for line in metrics(whole_run) if line["kind"] == "train"]
    assert means == pytest.approx([sum(single[step : step + 3]) / 3 for step in range(0, 15, 3)])


def test_every_epoch_has_a_record(tmp_path):
    train(tmp_path, log_every=50)
    assert [line["step"] for line in metrics(tmp_path) if line["kind"] == "train"] == [5, 10, 15]


def test_training_learns(whole_run):
    assert json.loads((whole_run / "summary.json").read_text())["best"]["top1"] > 60  # chance: 33


def test_a_killed_run_resumes_to_the_same_bits(whole_run, tmp_path):
    # inside step 13, after the checkpoint of step 12
    assert start(tmp_path, "die=25", "workers=1").returncode == -signal.SIGKILL
    assert not (tmp_path / "summary.json").exists()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 15, "half a line')
    train(tmp_path, resume=True, workers=2)
    assert_same_run(whole_run, tmp_path)


def test_two_processes_resume_to_the_same_bits(tmp_path):
    """DDP killed, FSDP stopped; few launches, because each takes seconds."""
    fsdp = ('strategy="fsdp"', "width=300", "plain=true", "lr=0.001")
    killed = start(tmp_path / "killed", "die=17", torchrun=2)
    assert killed.returncode != 0
    assert "SIGKILL" in killed.stderr
    assert len(metrics(tmp_path / "killed")) < 8
    runs = start(
        *(tmp_path / "killed", "resume=true", "--", tmp_path / "whole", "--"),
        *(tmp_path / "sharded", *fsdp, "--"),
        *(tmp_path / "stopped", *fsdp, "term=13", "--", tmp_path / "stopped", *fsdp, "resume=true"),
        torchrun=2,
    )
    assert runs.returncode == 0, runs.stderr
    assert runs.stderr.count(f"resuming {tmp_path / 'killed'} at step 8 of 15") == 1  # only the first process logs
    assert "stopped at step" in runs.stderr
    assert runs.stdout == ""
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert_same_run(tmp_path / "sharded", tmp_path / "stopped")

    # two processes that shard parameters and images compute the same as one
    train(tmp_path / "one", Classify(mix=False), Net(300, dropout=0.0, norm=False), lr=0.001)
    one, two = (load_file(tmp_path / name / "last/state.safetensors") for name in ("one", "sharded"))
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-3, atol=1e-5, msg=key)


def test_four_processes_resume_to_the_same_bits(tmp_path):
    """With three or more processes the order in which gradients are summed matters."""
    of = ("width=300", "lr=0.001", "batch_size=16")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    runs = start(whole, *of, "--", stopped, *of, "term=13", "--", stopped, *of, "resume=true", torchrun=4)
    assert runs.returncode == 0, runs.stderr
    assert "stopped at step" in runs.stderr
    assert_same_run(whole, stopped)


def test_a_request_to_stop_finishes_the_step_and_saves(whole_run, tmp_path):
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step 8 of 15; resume"):
        train(tmp_path, Classify(term=15))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    train(tmp_path, resume=True)
    assert_same_run(whole_run, tmp_path)


def test_a_stop_before_a_due_evaluation_evaluates_after_resuming(whole_run, tmp_path):
    with pytest.raises(KeyboardInterrupt, match="step 10 of 15"):
        train(tmp_path, Classify(term=20))
    assert metrics(tmp_path)[-1]["step"] < 10
    train(tmp_path, resume=True)
    assert_same_run(whole_run, tmp_path)


class FailsAt(Classify):
    """Fail in the nth evaluation."""

    def __init__(self, evaluation):
        super().__init__()
        self.left = evaluation

    def evaluate(self, model, batches):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("out of memory")
        return super().evaluate(model, batches)


def test_a_failing_evaluation_costs_no_training(whole_run, tmp_path):
    with pytest.raises(RuntimeError, match="out of memory"):
        train(tmp_path, FailsAt(2), save_steps=None)
    assert module.load_progress(tmp_path).step == 10
    task = Classify()
    train(tmp_path, task, resume=True)
    assert task.calls == 10
    assert_same_run(whole_run, tmp_path)


def test_a_run_that_ends_after_its_evaluation_evaluates_again(whole_run, tmp_path, monkeypatch):
    for name in ("save_weights", "save_state"):  # before best.safetensors and after it
        folder, write = tmp_path / name, getattr(module, name)

        def until_evaluated(*args, folder=folder, write=write):
            if any(line["kind"] == "eval" for line in metrics(folder)):
                raise OSError(errno.ENOSPC, "No space left on device")
            write(*args)

        monkeypatch.setattr(module, name, until_evaluated)
        with pytest.raises(OSError, match="No space left"):
            train(folder)
        monkeypatch.undo()
        assert module.load_progress(folder).evaluated == 0
        train(folder, resume=True)
        assert_same_run(whole_run, folder)


def test_resuming_a_finished_run_changes_nothing(whole_run, tmp_path):
    before = train(tmp_path)
    task = Classify()
    after = train(tmp_path, task, resume=True)
    assert task.calls == 0
    assert {key: before[key] for key in ("top1", "best", "steps")} == {
        key: after[key] for key in ("top1", "best", "steps")
    }
    assert_same_run(whole_run, tmp_path)


def test_a_run_is_not_overwritten(whole_run):
    before = {path: path.read_bytes() for path in whole_run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"already holds a run: resume it \(--resume\) or choose another"):
        train(whole_run)
    assert {path: path.read_bytes() for path in whole_run.rglob("*") if path.is_file()} == before


def test_resuming_needs_a_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no run to resume"):
        train(tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()


def test_accumulation_equals_one_big_batch(tmp_path):
    models = []
    for accumulate in (1, 4):
        models.append(Net(dropout=0.0, norm=False))
        train(tmp_path / str(accumulate), Classify(mix=False), models[-1], accumulate=accumulate)
    for one, four in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, four, rtol=1e-4, atol=1e-6)


def test_steps_override_epochs(tmp_path):
    assert train(tmp_path, steps=7, warmup_steps=2)["steps"] == 7
    assert [line["step"] for line in metrics(tmp_path) if line["kind"] == "eval"] == [5, 7]


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, amp):
    with pytest.raises(TrainingStopped, match=r"loss became nan in epoch 2, step 9, .* of 0\.0397; .*from step 8"):
        train(tmp_path, Classify(nan=18), amp=amp)
    state = load_file(tmp_path / "last/state.safetensors")
    assert all(value.isfinite().all() for value in state.values())
    assert module.load_progress(tmp_path).step == 8


class BadGradient(Classify):
    """A finite loss with a gradient that is not finite: the square root at zero."""

    def loss(self, model, batch):
        loss, parts = super().loss(model, batch)
        return (loss + (loss.detach() - loss).sqrt() if self.calls == 7 else loss), parts


def test_a_gradient_that_is_no_number_stops_the_run(tmp_path):
    with pytest.raises(TrainingStopped, match=r"the gradient norm became (nan|inf).* no checkpoint had been saved"):
        train(tmp_path, BadGradient(), save_steps=None)
    assert not (tmp_path / "last").exists()


class HugeOnce(Classify):
    """A finite loss that overflows once it is scaled."""

    def loss(self, model, batch):
        loss, parts = super().loss(model, batch)
        return loss * (1e35 if self.calls == 3 else 1.0), parts


def test_a_step_that_fp16_skips_is_no_reason_to_stop(tmp_path):
    assert train(tmp_path, HugeOnce(), amp="fp16", log_every=1)["steps"] == 15
    lines = [line for line in metrics(tmp_path) if line["kind"] == "train"]
    assert [line["step"] for line in lines if line["grad_norm"] is None] == [2]
    assert module.load_progress(tmp_path).scaler["scale"] == 2.0**15


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_named_once_and_counted(tmp_path, capfd, workers):
    summary = train(tmp_path, bad=(3, 4), bad_val=(7,), max_corrupt=0.04, workers=workers)
    errors = capfd.readouterr().err
    for name in ("training image 3: image_3", "training image 4: image_4", "evaluation image 7: image_7"):
        assert errors.count(f"skipped {name}.png is broken") == 1
    assert summary["images_skipped"] == {"training": 2, "evaluation": 1}
    assert summary["images"] == 30


def test_unreadable_images_are_remembered_by_the_resumed_run(tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Classify(term=15), bad=(3,))
    assert "image_3.png" in capfd.readouterr().err
    assert train(tmp_path, bad=(3,), resume=True)["images_skipped"]["training"] == 1
    assert "image_3.png" not in capfd.readouterr().err


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_unreadable_images_stop_the_run(tmp_path, workers):
    with pytest.raises(ValueError, match=r"2 of the 60 training images cannot be read, more than the 1") as info:
        train(tmp_path, bad=(3, 30), workers=workers)
    assert "\n" not in str(info.value)
    with pytest.raises(ValueError, match=r"of the 31 evaluation images cannot be read"):
        train(tmp_path / "evaluation", bad_val=range(31), workers=workers)
    with pytest.raises(ValueError, match=r"1 of the 60 training images cannot be read, more than the 0"):
        train(tmp_path / "none", bad=(3,), max_corrupt=0, workers=workers)


def test_a_full_disk_leaves_the_last_checkpoint(whole_run, tmp_path, monkeypatch):
    calls = []

    def fill_up(tensors, path, metadata):
        calls.append(path)
        if len(calls) > 4:  # step 4, step 5 before its evaluation, its best and after it, then step 8
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path, metadata)

    save_file = module.save_file
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_file", fill_up)
        with pytest.raises(OSError, match="No space left on device; the previous one is unchanged") as info:
            train(tmp_path)
    assert info.value.errno == errno.ENOSPC
    assert module.load_progress(tmp_path).step == 5
    train(tmp_path, resume=True)
    assert_same_run(whole_run, tmp_path)


class Tuples(Classify):
    """Plain (image, label) pairs, as ImageFolder returns them."""

    def loss(self, model, batch):
        image, label = batch
        return F.cross_entropy(model(image), label), {}

    def evaluate(self, model, batches):
        assert not model.training
        assert not torch.is_grad_enabled()
        return {"top1": float(sum(len(label) for _, label in batches))}


class Pairs(Images):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        return item["image"], item["label"]


def test_tuple_batches_and_a_frozen_part(tmp_path):
    model = Net()
    model.stem.requires_grad_(False)
    before = model.stem.weight.clone()
    summary = fit(Tuples(), model, Pairs(), Pairs(31, train=False), settings(ema=0.0, clip=None), tmp_path)
    assert summary["top1"] == 31
    assert torch.equal(model.stem.weight, before)
    assert model.training


def test_an_unused_parameter_survives_resuming(tmp_path):
    model = Net()
    model.unused = nn.Linear(2, 2)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Classify(term=15), model)
    again = Net()
    again.unused = nn.Linear(2, 2)
    train(tmp_path, Classify(), again, resume=True)
    assert torch.equal(model.unused.weight, again.unused.weight)


@pytest.mark.parametrize("optimizer", ["sgd", "lamb", "adafactor", "nadamw"])
def test_other_optimizers_resume_to_the_same_bits(tmp_path, optimizer):
    train(tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", Classify(term=15), optimizer=optimizer)
    train(tmp_path / "stopped", optimizer=optimizer, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
def test_a_compiled_model_keeps_its_keys(whole_run, tmp_path):
    train(tmp_path, compile=True)
    assert load_file(tmp_path / "best.safetensors").keys() == load_file(whole_run / "best.safetensors").keys()


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_gpu_run_resumes_to_the_same_bits(tmp_path, amp):
    train(tmp_path / "whole", device="cuda", amp=amp)
    with pytest.raises(KeyboardInterrupt, match="step 9 of 15"):  # reports are read one step late
        train(tmp_path / "stopped", Classify(term=15), device="cuda", amp=amp)
    train(tmp_path / "stopped", device="cuda", amp=amp, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.gpu
def test_a_gpu_run_stops_at_a_loss_that_is_no_number(tmp_path):
    with pytest.raises(TrainingStopped, match=r"loss became nan in epoch 2, step 8, .*from step 5"):
        train(tmp_path, Classify(nan=16), device="cuda")  # step 8 is where a checkpoint is due
    state = load_file(tmp_path / "last/state.safetensors")
    assert all(value.isfinite().all() for value in state.values())
