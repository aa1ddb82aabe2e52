# SPDX-License-Identifier: Apache-2.0
"""Resuming with other settings, data or files than at the start: what is accepted, logged and refused."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from timm.optim import create_optimizer_v2
from tiny import Classify, Images, Net, assert_same_run, metrics, settings, train
from torch import nn

from sola_vision.engine import TrainingStopped, fit, read_metadata
from sola_vision.engine import checkpoint as module


def test_a_folder_without_a_checkpoint_takes_another_run(whole_run, tmp_path):
    with pytest.raises(TrainingStopped, match="no checkpoint had been saved"):
        train(tmp_path, Classify(nan=4), log_every=1)
    assert metrics(tmp_path)
    train(tmp_path)
    assert_same_run(whole_run, tmp_path)


@pytest.mark.parametrize("kept", ["last/state.safetensors", "best.safetensors", "summary.json"])
def test_a_folder_with_any_result_does_not(whole_run, tmp_path, kept):
    (tmp_path / kept).parent.mkdir(exist_ok=True)
    shutil.copy(whole_run / kept, tmp_path / kept)
    with pytest.raises(ValueError, match=r"already holds a run: resume it \(--resume\) or choose another"):
        train(tmp_path)
    assert (tmp_path / kept).read_bytes() == (whole_run / kept).read_bytes()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_finished_run_without_its_state_is_not_begun_anew(whole_run, tmp_path):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    shutil.rmtree(folder / "last")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"run holds best\.safetensors but no last.state\.safetensors.* --init"):
        train(folder, resume=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such locks")
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_which_another_process_trains_is_left_alone(tmp_path, resume):
    """Before its first checkpoint, when no other file in the folder shows it."""
    words = ["epochs=100000", "warmup_epochs=1", "save_steps=null", "evaluate_every=100000", "log_every=1"]
    other = subprocess.Popen([sys.executable, tiny.__file__, tmp_path, *words], stderr=subprocess.DEVNULL)
    try:
        log = tmp_path / "metrics.jsonl"
        for _ in range(600):
            if log.exists() and log.stat().st_size:
                break
            time.sleep(0.1)
        begun = log.read_bytes()
        assert begun
        with pytest.raises(ValueError, match="another process is training there: wait until it ends or choose another"):
            train(tmp_path, resume=resume)
        assert log.read_bytes().startswith(begun)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
    train(tmp_path, resume=resume)  # a killed process holds no lock
    assert len(metrics(tmp_path)) < 20


def test_resuming_a_longer_run_is_refused(whole_run, tmp_path):
    """As with fewer images than at the start."""
    folder = shutil.copytree(whole_run, tmp_path / "run")
    with pytest.raises(ValueError, match=r"is at step \d+, past the \d+ steps .* more images or epochs"):
        train(folder, resume=True, epochs=2)
    assert metrics(folder) == metrics(whole_run)


def test_other_numbers_of_images_are_said_and_forget_which_were_skipped(tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Classify(term=15), bad=(3,))
    few = Images(48)
    summary = fit(Classify(), Net(), few, Images(31, train=False), settings(), tmp_path, resume=True)
    assert "continues with another configuration: 48 training images (was 60)\n" in capfd.readouterr().err
    assert summary["images_skipped"]["training"] == 0
    assert module.load_progress(tmp_path).images == {"training": 48, "evaluation": 31}


def test_a_state_of_the_version_before_resumes(whole_run, tmp_path, capfd):
    """It stores neither the number of images nor the metadata of the weights."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Classify(term=15))
    path = tmp_path / "last/state.safetensors"
    said = read_metadata(path)
    progress = json.loads(said["progress"])
    del progress["images"], progress["metadata"]
    module.save_file(load_file(path), path, said | {"progress": json.dumps(progress)})
    train(tmp_path, resume=True)
    assert "continues with another" not in capfd.readouterr().err
    assert_same_run(whole_run, tmp_path)


def test_resuming_another_model_or_optimizer_is_refused(whole_run, tmp_path):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("{}\n")  # a refused run must not cut this off
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="belongs to another model"):
        train(folder, model=Net(width=16), resume=True)
    with pytest.raises(ValueError, match=r"optimizer='sgd' cannot resume from the state of 'adamw' .*resume with"):
        train(folder, optimizer="sgd", resume=True)
    with pytest.raises(ValueError, match=r"batch_size=\d+ cannot resume .* number of batches of \d+: resume with"):
        train(folder, batch_size=2 * settings().batch_size, resume=True)
    with pytest.raises(ValueError, match=r"2 parameter groups instead of 1: .*weight_decay"):
        train(folder, weight_decay=0, resume=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_moving_average_cannot_begin_later(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Classify(term=8), ema=0)
    with pytest.raises(ValueError, match=r"ema=0.5 cannot resume .* no moving average: resume with 0"):
        train(tmp_path, ema=0.5, resume=True)
    train(tmp_path, ema=0, resume=True)


def test_runs_of_so_many_steps_may_change_the_batch_size(tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Classify(term=8), steps=12)
    train(tmp_path, steps=12, batch_size=24, resume=True)
    assert "batch_size=24 (was 12)" in capfd.readouterr().err
    assert module.load_progress(tmp_path).step == 12


def test_a_state_without_an_optimizer_is_refused(whole_run, tmp_path):
    folder = shutil.copytree(whole_run, tmp_path / "run")
    state = folder / "last/state.safetensors"
    module.save_file(load_file(state), state, {"progress": read_metadata(state)["progress"]})
    with pytest.raises(ValueError, match=r"state\.safetensors holds no optimiser state"):
        train(folder, resume=True)


def test_a_resumed_run_decays_as_it_is_asked_to(whole_run, tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Classify(term=15))
    train(tmp_path, weight_decay=20.0, resume=True)
    assert "weight_decay=20.0 (was 0.05)" in capfd.readouterr().err
    norms = [
        load_file(folder / "last/state.safetensors")["model/head.weight"].norm() for folder in (whole_run, tmp_path)
    ]
    assert norms[1] < 0.5 * norms[0]


@pytest.mark.parametrize(("before", "now"), [("none", "fp16"), ("fp16", "none")])
def test_a_run_goes_on_with_another_precision(tmp_path, before, now):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Classify(term=15), amp=before)
    assert train(tmp_path, amp=now, resume=True)["steps"] == 15


def test_a_restored_state_lies_in_memory_as_its_parameter_does(tmp_path):
    """Fused optimisers read both as one array each."""
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    image = torch.randn(2, 3, 8, 8)
    trained, restored = (create_optimizer_v2(model, opt="adamw", lr=0.1, fused=True) for _ in range(2))
    model(image).square().sum().backward()
    trained.step()
    module.save_state(tmp_path, {"model": model}, trained, module.Progress())
    module.load_state(tmp_path, {"model": model}, restored)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    trained.step()
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(before)
    restored.step()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mapped files are listed only by Linux")
@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])  # lamb keeps a tensor in its parameter groups as well
def test_a_restored_state_does_not_keep_its_file_mapped(tmp_path, optimizer):
    """Windows would refuse to replace the file, which is what the next save does."""
    model = nn.Linear(4, 3)
    trained = create_optimizer_v2(model, opt=optimizer)
    model(torch.ones(2, 4)).sum().backward()
    trained.step()
    module.save_state(tmp_path, {"model": model}, trained, module.Progress())
    restored = create_optimizer_v2(model, opt=optimizer)
    module.load_state(tmp_path, {"model": model}, restored)
    assert restored.state
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
