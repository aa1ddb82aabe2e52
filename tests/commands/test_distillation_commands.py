# SPDX-License-Identifier: Apache-2.0
"""Distillation from the command line: files of a run, resuming after a kill, the teacher, invalid input."""

import json
import shutil
import signal
import socket
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from small import CLASSES, TINY, python

from sola_vision.cli import main
from sola_vision.engine import read_metadata
from sola_vision.tasks import load_checkpoint

TEACHER = "mobilenetv3_small_050"
TAUGHT = [
    *("train", "distill_few_images", "--model.dims", "[8,16,32,32]", "--image.size", 32, "--train.amp", "none"),
    *("--train.epochs", 2, "--train.warmup_epochs", 0, "--train.batch_size", 14, "--train.device", "cpu"),
    *("--train.log_every", 1, "--train.evaluate_every", 1, "--train.workers", 0),
    *("--train.save_steps", 2, "--train.ema", 0.9),
]


def _taught(data, *words):
    return [str(word) for word in (*TAUGHT, "--data", data, "--out", "run", *words)]


@pytest.fixture(scope="module")
def taught(tmp_path_factory, data, trained):
    """The folder of a finished run, with a teacher of the same classes; tests must not write there."""
    folder = tmp_path_factory.mktemp("runs") / "taught"
    assert main(_taught(data, "--teacher.checkpoint", trained, "--out", folder)) == 0
    return folder


def _records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    clocks = {"seconds", "images_per_second"}
    return [{name: value for name, value in json.loads(line).items() if name not in clocks} for line in lines]


def _tensors(file):
    return {name: value.numpy().tobytes() for name, value in load_file(file).items()}


def _same(one, other):
    assert _tensors(one / "best.safetensors") == _tensors(other / "best.safetensors")
    assert _tensors(one / "last/state.safetensors") == _tensors(other / "last/state.safetensors")
    assert _records(one) == _records(other)


# a run ---------------------------------------------------------------------------------------------------------------
def test_the_records_have_every_part_and_the_ceiling(sola, data, taught, trained):
    steps = [record for record in _records(taught) if record["kind"] == "train"]
    assert len(steps) == 6
    for record in steps:
        answers = 0.5 * record["labels"] + 0.5 * record["targets"]
        assert record["loss"] == pytest.approx(answers + record["features"], rel=1e-5)
    said = sola("eval", "--checkpoint", trained, "--data", data, "--workers", 0, "--json", "--out", "ceiling")
    evaluations = [record for record in _records(taught) if record["kind"] == "eval"]
    assert [record["teacher_top1"] for record in evaluations] == [pytest.approx(json.loads(said.out)["top1"])] * 2
    assert "teacher_top1" in json.loads((taught / "summary.json").read_text())


def test_the_student_is_a_classifier_like_any_other(sola, data, taught, trained):
    checkpoint = load_checkpoint(taught)
    assert (checkpoint.task, checkpoint.name, checkpoint.classes) == ("classification", "sola_nano", CLASSES)
    best, state = load_file(taught / "best.safetensors"), load_file(taught / "last/state.safetensors")
    assert best.keys() == load_file(trained / "best.safetensors").keys()
    assert {name for name in state if name.startswith("model/projections.")} == {
        f"model/projections.{level}.{kind}" for level in range(4) for kind in ("weight", "bias")
    }
    said = sola("eval", "--checkpoint", taught, "--data", data, "--workers", 0, "--json", "--out", "answers")
    assert json.loads(said.out)["top1"] == json.loads((taught / "summary.json").read_text())["best"]["top1"]
    assert sola("predict", data / "val" / "ant", "--checkpoint", taught, "--json").code == 0
    assert sola(*TINY, "--data", data, "--out", "next", "--init", taught, "--train.steps", 1).code == 0


def test_the_teacher_is_noted_and_the_run_is_repeated_by_its_config(sola, tmp_path, taught, trained):
    teacher = yaml.safe_load((taught / "config.yaml").read_text())["teacher"]
    noted = json.loads(read_metadata(taught / "best.safetensors")["teacher"])
    assert noted == {"name": "sola_nano", "sha256": teacher["sha256"]}
    assert sola("train", "--config", taught / "config.yaml", "--out", "again").code == 0
    _same(tmp_path / "again", taught)


def test_killed_run_ends_with_the_same_bits(sola, tmp_path, data, taught, trained):
    words = _taught(data, "--teacher.checkpoint", trained, "--out", "killed")
    ended = python(Path(__file__).with_name("killed.py"), 6, *words)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert sola("train", "--resume", "--out", "killed").code == 0
    _same(tmp_path / "killed", taught)


def test_a_run_goes_on_with_its_teacher_only(sola, tmp_path, data, taught, trained):
    shutil.copytree(taught, tmp_path / "run")
    shutil.copytree(trained, tmp_path / "other")
    weights = load_file(trained / "best.safetensors")
    weights["head.fc.bias"] += 1e-6
    save_file(weights, tmp_path / "other/best.safetensors", read_metadata(trained / "best.safetensors"))
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    said = sola("train", "--resume", "--out", "run", "--teacher.checkpoint", "other", "--train.epochs", 3)
    assert (said.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert "not those that the run was started with" in said.err
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    # the same teacher from another place is the same teacher
    shutil.copytree(trained, tmp_path / "moved")
    assert sola("train", "--resume", "--out", "run", "--teacher.checkpoint", "moved").code == 0


def test_a_teacher_of_other_classes_teaches_its_maps(sola, tmp_path, data):
    torch.manual_seed(0)
    save_file(timm.create_model(TEACHER).state_dict(), tmp_path / "it.safetensors")
    words = _taught(data, "--teacher.name", TEACHER, "--teacher.checkpoint", "it.safetensors", "--train.steps", 2)
    said = sola(*words, "--train.layer_decay", 0.8)
    assert said.code == 0
    notes = [line for line in said.err.splitlines() if "only its feature maps are learned" in line]
    assert notes == ["the teacher lacks 7 of the data's 7 classes, such as 'ant': only its feature maps are learned"]
    step = _records(tmp_path / "run")[0]
    assert "targets" not in step
    assert step["loss"] == pytest.approx(step["labels"] + step["features"], rel=1e-5)
    assert "teacher_top1" not in json.loads((tmp_path / "run/summary.json").read_text())


def test_a_network_of_timm_learns_from_answers_alone(sola, tmp_path, data, trained):
    words = [*_taught(data, "--teacher.checkpoint", trained), "--model.name", "resnet10t", "--model.dims", "null"]
    assert sola(*words, "--distill.feature_weight", 0, "--distill.targets", "hard", "--train.steps", 1).code == 0
    assert "features" not in _records(tmp_path / "run")[0]
    assert load_checkpoint(tmp_path / "run").name == "resnet10t"


# several processes, compilation --------------------------------------------------------------------------------------
def _torchrun(*words):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return python("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", port, *words)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_killed_processes_end_with_the_same_bits(tmp_path, data, trained, strategy):
    words = _taught(data, "--teacher.checkpoint", trained.resolve(), "--train.batch_size", 20)
    words += ["--train.strategy", strategy]
    ended = _torchrun("-m", "sola_vision", *words, "--out", "whole")
    assert ended.returncode == 0, ended.stderr
    assert _torchrun(Path(__file__).with_name("killed.py"), 4, *words, "--out", "killed").returncode != 0
    assert _torchrun("-m", "sola_vision", "train", "--resume", "--out", "killed").returncode == 0
    _same(tmp_path / "killed", tmp_path / "whole")
    assert load_checkpoint(tmp_path / "whole").classes == CLASSES


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the compiler
def test_a_compiled_student_keeps_its_keys(sola, tmp_path, data, trained, taught):
    words = _taught(data, "--teacher.checkpoint", trained, "--train.steps", 1, "--train.compile", "true")
    assert sola(*words).code == 0
    assert load_file(tmp_path / "run/best.safetensors").keys() == load_file(taught / "best.safetensors").keys()


# bad input -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], ["needs a teacher", "--teacher.checkpoint RUN", "--teacher.name NAME"]),
        (["--teacher.name", "resnet17"], ["'resnet17'", "unknown"]),
        (["--teacher.checkpoint", "nowhere"], ["nowhere"]),
        (["--teacher.checkpoint", "RUN", "--teacher.name", "resnet18"], ["is a checkpoint of sola_nano", "resnet18"]),
        (["--teacher.checkpoint", "RUN", "--teacher.sha256", "12ab"], ["12ab", "was started with"]),
        (["--teacher.name", TEACHER, "--teacher.checkpoint", "it.safetensors", "--distill.targets", "soft"], ["'ant'"]),
        (
            ["--teacher.name", TEACHER, "--teacher.checkpoint", "it.safetensors", "--distill.feature_weight", "0"],
            ["nothing is left to learn", "feature_weight is 0"],
        ),
        (
            ["--teacher.checkpoint", "RUN", "--distill.target_weight", "0", "--distill.feature_weight", "0"],
            ["nothing is left to learn", "weigh 0"],
        ),
        (
            ["--teacher.name", "resnet18", "--teacher.checkpoint", "it.safetensors"],
            ["resnet18", "missing", "unexpected"],
        ),
        (["--teacher.checkpoint", "it.safetensors"], ["--teacher.name"]),
        (["--teacher.checkpoint", "RUN", "--distill.temperature", "0"], ["temperature=0"]),
        (["--teacher.checkpoint", "RUN", "--distill.targets", "firm"], ["--distill.targets", "'firm'", "soft or hard"]),
        (["--teacher.checkpoint", "RUN", "--teacher.size", "0"], ["size=0"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_bad_input_is_refused(refused, tmp_path, data, trained, words, names):
    if "it.safetensors" in words:
        save_file(timm.create_model(TEACHER).state_dict(), tmp_path / "it.safetensors")
    refused(*_taught(data, *(str(trained) if word == "RUN" else word for word in words)), names=names)
