# SPDX-License-Identifier: Apache-2.0
"""Weights are restored completely or not at all; code is never unpickled; the old file survives every failure."""

import errno
import os
import signal
import stat
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from sola_vision.engine import checkpoint as module
from sola_vision.engine import load_weights, read_metadata, save_weights


def net(width=4, classes=3):
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, classes))


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def averaged(model):
    """Return a checkpoint of timm's training: options, weights, and their moving average with DDP's key prefix."""
    average = {f"module.{key}": value for key, value in model.state_dict().items()}
    return {"args": Namespace(lr=1.0), "state_dict": net().state_dict(), "state_dict_ema": average}


@pytest.mark.parametrize("kind", ["safetensors", "pt", "nested.pth", "pth.tar", "ema.pth", "safetensors.pth"])
def test_load_weights_restores_every_bit(tmp_path, kind):
    path, source, target = tmp_path / f"w.{kind}", net(), net()
    if "safetensors" in kind:
        save_weights(path, source, {"classes": "cat dog"})
        assert read_metadata(path) == {"classes": "cat dog"}
    else:
        state = source.state_dict()
        both = {"model": net().state_dict(), "model_ema": state}  # as older versions of timm wrote them
        kinds = {"nested.pth": {"model": state}, "pth.tar": averaged(source), "ema.pth": both}
        torch.save(kinds.get(kind, state), path)
    report = load_weights(target, path)
    assert not report
    assert equal(source, target)


def test_load_weights_lists_what_differs_and_loads_nothing(tmp_path):
    save_weights(tmp_path / "w.safetensors", net(classes=5))
    target = nn.Sequential(*net(), nn.Linear(3, 1))
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"2 missing \(3.weight, 3.bias\), 2 resized \(2.weight 5x4 instead of 3x4"
    ) as info:
        load_weights(target, tmp_path / "w.safetensors")
    assert "\n" not in str(info.value)
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_load_weights_partial_takes_what_fits(tmp_path):
    source, target = net(classes=5), nn.Sequential(*list(net())[:2])
    save_weights(tmp_path / "w.safetensors", source)
    report = load_weights(target, tmp_path / "w.safetensors", partial=True)
    assert report.unexpected == ("2.bias", "2.weight")
    assert not report.missing
    assert not report.resized
    assert torch.equal(source[0].weight, target[0].weight)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_a_pickle_with_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"0.weight": Malicious()}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"w\.pt holds code") as info:
        load_weights(net(), tmp_path / "w.pt")
    assert "\n" not in str(info.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_damaged_file_is_one_clear_error(tmp_path, suffix):
    path = tmp_path / f"w.{suffix}"
    if suffix == "pt":
        torch.save(net().state_dict(), path)
    else:
        save_weights(path, net())
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"text" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=path.name) as info:
            load_weights(net(), path)
        assert "\n" not in str(info.value)
    with pytest.raises(FileNotFoundError, match="none"):
        load_weights(net(), tmp_path / f"none.{suffix}")


def test_a_state_dict_of_something_else_is_refused(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="no state_dict"):
        load_weights(net(), tmp_path / "w.pt")


def test_a_full_disk_leaves_the_old_file(tmp_path):
    resource = pytest.importorskip("resource")
    path, old = tmp_path / "w.safetensors", net()
    save_weights(path, old)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # a real failure in the middle of the file
    try:
        with pytest.raises(OSError, match="the previous one is unchanged") as info:
            save_weights(path, net(width=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert info.value.errno == errno.EFBIG
    assert "\n" not in str(info.value)
    assert os.listdir(tmp_path) == ["w.safetensors"]
    target = net()
    load_weights(target, path)
    assert equal(old, target)


@pytest.mark.parametrize("step", ["save_file", "_flush", "os.replace"])
def test_a_failure_at_any_moment_leaves_a_complete_file(tmp_path, monkeypatch, step):
    path, old = tmp_path / "w.safetensors", net()
    save_weights(path, old)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os if step == "os.replace" else module, step.removeprefix("os."), full)
        with pytest.raises(OSError, match="No space left") as info:
            save_weights(path, net())
        assert info.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == ["w.safetensors"]
    target = net()
    load_weights(target, path)
    assert equal(old, target)


def test_files_are_flushed_through_handles_that_may_write(tmp_path, monkeypatch):
    """Windows can only flush files opened for writing."""
    fsync, flushed = os.fsync, []

    def strict(handle):
        if stat.S_ISREG(os.fstat(handle).st_mode):
            os.write(handle, b"")
            flushed.append(handle)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", strict)
    save_weights(tmp_path / "a.safetensors", nn.Linear(2, 2))
    assert flushed


def test_folders_that_cannot_be_flushed_are_no_obstacle(tmp_path, monkeypatch):
    """Some network file systems cannot flush folders; a file that cannot be flushed is an error."""
    fsync, of_files = os.fsync, False

    def partly(handle):
        if of_files or stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", partly)
    save_weights(tmp_path / "a.safetensors", nn.Linear(2, 2))
    assert os.listdir(tmp_path) == ["a.safetensors"]
    of_files = True
    with pytest.raises(OSError, match="Invalid argument"):
        save_weights(tmp_path / "b.safetensors", nn.Linear(2, 2))


def test_what_a_killed_writer_left_behind_is_no_obstacle(tmp_path):
    (tmp_path / ".new").mkdir()
    (tmp_path / ".new" / ".tmp123").write_bytes(b"half")
    save_weights(tmp_path / "w.safetensors", net())
    assert os.listdir(tmp_path) == ["w.safetensors"]


def test_tied_and_sliced_tensors_can_be_written(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].bias.data = torch.arange(6.0)[::2]
    save_weights(tmp_path / "w.safetensors", model)
    assert load_file(tmp_path / "w.safetensors")["0.bias"].tolist() == [0.0, 2.0, 4.0]


def test_equal_weights_are_equal_files(tmp_path):
    """safetensors orders metadata at random."""
    about = {name: "é\n" * len(name) for name in ("task", "model", "image", "classes", "metric", "value")}
    for number in range(4):
        torch.manual_seed(0)
        save_weights(tmp_path / f"{number}.safetensors", net(), about)
    files = [(tmp_path / f"{number}.safetensors").read_bytes() for number in range(4)]
    assert files == files[:1] * 4
    assert read_metadata(tmp_path / "0.safetensors") == about
