# SPDX-License-Identifier: Apache-2.0
"""Segmentation from the command line: files of a run, resuming after a kill, numbers, pictures, invalid input."""

import csv
import json
import os
import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from small import python

from sola_vision.cli import main
from sola_vision.data.scenes import write_segmentation
from sola_vision.tasks.segmenter import load_segmenter

REAL = Path(os.environ.get("SOLA_DATA", Path(__file__).parents[3] / "shared" / "data"))
CLASSES = ["ground", "disc", "square", "triangle", "cross"]
TINY = [
    *("train", "few_masks", "--model.dims", "[8,16,24,32]", "--model.head_dim", 8, "--segmenter.channels", 16),
    *("--segmenter.auxiliary_channels", 8, "--image.size", 48, "--image.crop", 48, "--train.steps", 6),
    *("--train.batch_size", 4, "--train.warmup_steps", 1, "--train.log_every", 1, "--train.evaluate_every", 2),
    *("--train.device", "cpu", "--train.workers", 0, "--train.amp", "none"),
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_segmentation(root, 8, 5, (48, 64))
    return root


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory, scenes):
    """The folder of a finished run; tests must not write there."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert main([str(word) for word in (*TINY, "--data", scenes, "--out", folder)]) == 0
    return folder


def _records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    clocks = {"seconds", "images_per_second"}
    return [{name: value for name, value in json.loads(line).items() if name not in clocks} for line in lines]


def _best(folder):
    return {name: value.numpy().tobytes() for name, value in load_file(folder / "best.safetensors").items()}


def _torchrun(*words):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return python("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", port, *words)


# train ---------------------------------------------------------------------------------------------------------------
def test_train_leaves_a_whole_folder(segmenter):
    summary = json.loads((segmenter / "summary.json").read_text())
    assert {"miou", "miou_all", "mean_accuracy", "pixel_accuracy", "best"} <= summary.keys()
    assert [record["kind"] for record in _records(segmenter)] == [*["train"] * 4, "eval", *["train"] * 2, "eval"]
    assert {"loss", "main", "auxiliary"} <= _records(segmenter)[0].keys()
    assert Image.open(segmenter / "curve.png").size[0] > 300
    config = yaml.safe_load((segmenter / "config.yaml").read_text())
    assert (config["image"]["ignore"], config["segmenter"]["channels"]) == (255, 16)
    with safe_open(segmenter / "best.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == CLASSES
        assert json.loads(file.metadata()["task"]) == "segmentation"


def test_killed_run_ends_with_the_same_bits(sola, tmp_path, scenes, segmenter):
    words = [*TINY, "--data", scenes, "--train.save_steps", 3]
    ended = python(Path(__file__).with_name("killed.py"), 5, *words, "--out", "killed")
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "killed" / "summary.json").exists()
    assert sola("train", "--resume", "--out", "killed").code == 0
    assert _best(tmp_path / "killed") == _best(segmenter)
    assert _records(tmp_path / "killed") == _records(segmenter)


def test_init_from_a_classifier_and_from_a_segmenter(sola, tmp_path, data, scenes, segmenter):
    plain = ["--model.dims", "[8,16,24,32]", "--model.head_dim", 8, "--train.device", "cpu", "--train.steps", 1]
    fast = ["--train.batch_size", 8, "--train.warmup_epochs", 0, "--train.workers", 0]
    bridged = ["--model.bridges", "paper"]
    assert sola("train", "digits", "--data", data, "--out", "c", *plain, *fast, *bridged).code == 0
    start = [*TINY, "--data", scenes, "--train.steps", 1, "--train.lr", 1e-9, "--train.warmup_steps", 0]
    refused = sola(*start, "--out", "no", "--init", "c")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "drop_bridges" in refused.err
    assert not (tmp_path / "no").exists()
    said = sola(*start, "--out", "s", "--init", "c", "--segmenter.drop_bridges", "true")
    assert said.code == 0
    assert "weights of bridges dropped" in said.err
    before, after = load_file(tmp_path / "c" / "best.safetensors"), load_file(tmp_path / "s" / "best.safetensors")
    name = "stages.1.layers.0.norm1.weight"
    assert torch.allclose(before[name], after[f"backbone.body.model.{name}"], atol=1e-5)
    said = sola(*start, "--out", "t", "--init", segmenter)
    assert said.code == 0
    assert f"weights from {segmenter / 'best.safetensors'}\n" in said.err
    mine, theirs = load_file(tmp_path / "t" / "best.safetensors"), load_file(segmenter / "best.safetensors")
    assert torch.allclose(mine["head.classifier.weight"], theirs["head.classifier.weight"], atol=1e-5)


def test_a_broken_image_is_named_and_counted(sola, tmp_path, scenes):
    shutil.copytree(scenes, tmp_path / "data")
    (tmp_path / "data" / "images" / "train" / "00002.png").write_bytes(b"no image")
    (tmp_path / "data" / "images" / "val" / "00003.png").write_bytes(b"no image")
    said = sola(*TINY, "--data", "data", "--out", "run")
    assert said.code == 0
    for name in ("train/00002.png", "val/00003.png"):
        assert said.err.count(name) == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["images_skipped"] == {
        "training": 1,
        "evaluation": 1,
    }


# eval ----------------------------------------------------------------------------------------------------------------
def test_eval_numbers_are_right(sola, tmp_path, scenes, segmenter):
    said = sola("eval", "--checkpoint", segmenter, "--data", scenes, "--workers", 0, "--json", "--out", "e")
    assert (said.code, said.err) == (0, "")
    result = json.loads(said.out)
    model = load_segmenter(segmenter).model
    right = labelled = 0
    for file in sorted((scenes / "images" / "val").iterdir()):
        pixels = np.asarray(Image.open(file), dtype=np.float32) / 255
        pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        with torch.no_grad():
            logits = model(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1)[None])[0]
        truth = np.asarray(Image.open(scenes / "annotations" / "val" / file.name))
        right += (logits.argmax(0).numpy() == truth).sum()
        labelled += truth.size
    assert result["pixel_accuracy"] == pytest.approx(100 * right / labelled)
    assert result["images"] == 5
    assert result["rule"] == "labels 0..4 are classes, 255 is ignored"
    with (tmp_path / "e" / "classes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == CLASSES
    assert sum(int(row["pixels"]) for row in rows) == labelled
    for name in ("confusion.png", "worst.png"):
        assert Image.open(tmp_path / "e" / name).size[0] > 300
    # during training the same numbers were measured
    assert result["miou"] == pytest.approx(json.loads((segmenter / "summary.json").read_text())["best"]["miou"])


def test_other_looks_and_sizes(sola, scenes, segmenter):
    looks = [[], ["--slide", 32, "--stride", 16], ["--flip", "--scales", 0.5, 1.0], ["--size", 96]]
    numbers = []
    for look in looks:
        said = sola("eval", "--checkpoint", segmenter, "--data", scenes, "--workers", 0, "--json", "--out", "e", *look)
        assert said.code == 0, said.err
        numbers.append(json.loads(said.out)["pixel_accuracy"])
    assert all(0 < number <= 100 for number in numbers)
    assert len(set(numbers)) > 1


def test_two_processes_give_the_numbers_of_one(sola, tmp_path, scenes, segmenter):
    words = ["eval", "--checkpoint", segmenter, "--data", scenes, "--workers", 0, "--device", "cpu"]
    assert sola(*words, "--out", "one").code == 0
    ended = _torchrun("-m", "sola_vision", *words, "--out", "two")
    assert ended.returncode == 0, ended.stderr
    results = [json.loads((tmp_path / name / "eval.json").read_text()) for name in ("one", "two")]
    for result in results:
        del result["seconds"]
    assert results[0] == results[1]
    assert len(results[1]["image_accuracy"]) == 5


def test_scoring_folders_of_labels(sola, tmp_path, scenes):
    truth = scenes / "annotations" / "val"
    words = ["eval", "--annotations", truth, "--classes", 5, "--ignore", 255, "--json", "--out", "e"]
    perfect = json.loads(sola(*words, "--predictions", truth).out)
    assert (perfect["miou"], perfect["pixel_accuracy"], perfect["mean_accuracy"]) == (100, 100, 100)
    assert [row["class"] for row in perfect["classes"]] == CLASSES
    shutil.copytree(truth, tmp_path / "mine")
    for file in (tmp_path / "mine").iterdir():
        Image.fromarray(np.zeros_like(np.asarray(Image.open(file)))).save(file)
    pixels = np.concatenate([np.asarray(Image.open(file)).ravel() for file in truth.iterdir()])
    ground = (pixels == 0).mean()
    result = json.loads(sola(*words, "--predictions", "mine").out)
    assert result["pixel_accuracy"] == pytest.approx(100 * ground)
    assert result["miou"] == pytest.approx(100 * ground / len(np.unique(pixels)))
    # with label 0 ignored, a prediction of 0 is a pixel without a class: all of them are missed
    words[words.index("--classes") + 1], words[words.index("--ignore") + 1] = 4, 0
    assert json.loads(sola(*words, "--predictions", "mine").out)["pixel_accuracy"] == 0


def test_perfect_predictions_of_ade20k(sola, capsys):
    """100 % over the classes that occur, 15 / 150 over all: both are printed."""
    sample = REAL / "ade20k_sample"
    if not sample.is_dir():
        pytest.skip(f"needs ade20k_sample in {REAL} (SOLA_DATA)")
    folders = ["--predictions", sample / "predictions" / "validation"]
    folders += ["--annotations", sample / "annotations" / "validation"]
    said = sola("eval", *folders, "--classes", 150, "--ignore", 0, "--out", "e")
    assert "mIoU 100.00 % over the 15 classes that occur, 10.00 % over all 150" in said.out
    result = json.loads(Path("e/eval.json").read_text())
    assert (result["miou"], result["classes_present"]) == (100, 15)
    assert result["miou_all"] == pytest.approx(100 * 15 / 150)


# predict -------------------------------------------------------------------------------------------------------------
def test_predict_leaves_labels_pictures_and_a_page(sola, tmp_path, scenes, segmenter):
    source = scenes / "images" / "val"
    said = sola("predict", source, "--checkpoint", segmenter, "--out", "p", "--json")
    document = json.loads(said.out)
    assert [row["image"] for row in document["images"]] == sorted(file.name for file in source.iterdir())
    for row in document["images"]:
        labels = Image.open(tmp_path / "p" / row["labels"])
        assert (labels.mode, labels.size) == ("P", (64, 48))
        counts = np.bincount(np.asarray(labels).ravel(), minlength=5)
        assert row["shares"] == {CLASSES[k]: pytest.approx(counts[k] / labels.size[0] / labels.size[1])
                                 for k in np.argsort(-counts, kind="stable") if counts[k]}  # fmt: skip
        drawn = Image.open(tmp_path / "p" / row["picture"])
        assert drawn.size[0] > 640  # with a legend beside it
        assert drawn.size[1] == 480  # small images are enlarged
    page = (tmp_path / "p" / "index.html").read_text()
    assert all(row["picture"] in page for row in document["images"])
    # eval scores the files that predict writes
    said = sola("eval", "--predictions", "p/labels", "--annotations", scenes / "annotations" / "val",
                "--classes", 5, "--ignore", 255, "--json", "--out", "e")  # fmt: skip
    direct = sola("eval", "--checkpoint", segmenter, "--data", scenes, "--workers", 0, "--json", "--out", "f")
    assert json.loads(said.out)["miou"] == json.loads(direct.out)["miou"]


def test_predict_a_single_image_among_broken_ones(sola, tmp_path, scenes, segmenter):
    image = scenes / "images" / "val" / "00001.png"
    said = sola("predict", image, "--checkpoint", segmenter)
    assert said.code == 0
    assert (tmp_path / "predictions" / "labels" / "00001.png").exists()
    assert not (tmp_path / "predictions" / "index.html").exists()
    assert sola("predict", image, "--checkpoint", segmenter).code == 0  # replaces the same files
    said = sola("predict", scenes / "images" / "val" / "00002.png", "--checkpoint", segmenter)
    assert "sola: --out predictions: predictions/labels/00001.png would be mixed with the results" in said.err
    (tmp_path / "mixed").mkdir()
    Image.new("L", (33, 21), 90).save(tmp_path / "mixed" / "a.png")
    Image.new("RGB", (20, 90)).save(tmp_path / "mixed" / "a.jpg")
    (tmp_path / "mixed" / "b.png").write_bytes(b"no image")
    said = sola("predict", "mixed", "--checkpoint", segmenter, "--out", "m", "--json")
    assert said.code == 0
    assert "skipped: " in said.err
    assert "b.png" in said.err
    rows = {row["image"]: row["labels"] for row in json.loads(said.out)["images"]}
    assert Image.open(tmp_path / "m" / rows["a.png"]).size == (33, 21)
    assert Image.open(tmp_path / "m" / rows["a.jpg"]).size == (20, 90)


# bad input -----------------------------------------------------------------------------------------------------------
def test_one_class_is_no_training_set(refused, tmp_path, scenes):
    shutil.copytree(scenes, tmp_path / "single")
    (tmp_path / "single" / "classes.txt").write_text("ground\n")
    words = [*TINY, "--data", "single", "--out", "run"]
    refused(*words, names=["single", "'ground' is the only class", "--image.ignore"])


def test_bad_input_of_eval_and_predict(refused, tmp_path, scenes, segmenter):
    truth = scenes / "annotations" / "val"
    shutil.copytree(truth, tmp_path / "nameless")
    refused(
        *("eval", "--predictions", "nameless", "--annotations", "nameless", "--classes", 3, "--ignore", 255),
        names=["nameless/0000", "label 4", "labels 0..2 are classes"],
    )
    folders = ["eval", "--predictions", truth, "--annotations", truth]
    refused(*folders, names=["sola: eval --predictions also needs --classes and --ignore\n"])
    looks = (["--slide", 32], ["--stride", 9], ["--size", 64], ["--flip"], ["--scales", 0.5, 1.0])
    for words in (["--checkpoint", segmenter], ["--data", scenes], *looks):
        refused(*folders, "--classes", 5, "--ignore", 255, *words,
                names=[" ".join(map(str, words)), "--predictions", "leave one out"])  # fmt: skip
    refused(*folders, "--classes", 3, "--ignore", 255, names=["classes.txt names 5 classes", "3"])
    refused(*folders, "--classes", 5, "--ignore", 2, names=["ignore=2"])
    refused("eval", "--checkpoint", segmenter, names=["--data"])
    refused("eval", "--checkpoint", segmenter, "--data", scenes, "--stride", 9, names=["stride=9"])
    for words in (["--stride", 0], ["--slide", 32, "--stride", 0]):
        refused("eval", "--checkpoint", segmenter, "--data", scenes, *words, names=["stride=0"])
    refused("eval", "--checkpoint", segmenter, "--data", scenes, "--slide", 0, "--stride", 9,
            names=["stride=9", "omit stride"])  # fmt: skip
    refused("predict", tmp_path / "none", "--checkpoint", segmenter, names=["none"])
    refused("predict", scenes, "--checkpoint", segmenter, "--opacity", 2, names=["--opacity 2"])
    (tmp_path / "taken").write_text("mine")
    refused("predict", scenes, "--checkpoint", segmenter, "--out", "taken", names=["--out taken: taken is a file"])
    (tmp_path / "few").mkdir()
    shutil.copy(truth / "00000.png", tmp_path / "few")
    words = ["eval", "--annotations", truth, "--classes", 5, "--ignore", 255]
    refused(*words, "--predictions", "few", names=["00001.png", "4 of 5"])
    refused(*words, "--predictions", "none", names=["none"])
    shutil.copytree(truth, tmp_path / "small")
    Image.new("L", (4, 5)).save(tmp_path / "small" / "00002.png")
    refused(*words, "--predictions", "small", names=["00002.png", "4x5", "64x48"])


def test_bad_input_of_train(refused, tmp_path, scenes):
    words = [*TINY, "--out", "run"]
    refused(*words, "--data", "none", names=["none"])
    refused(*words, "--data", scenes, "--image.num_classes", 7, names=["classes.txt", "7"])
    refused(*words, "--data", scenes, "--image.ignore", 2, names=["ignored 2"])
    refused(*words, "--data", scenes, "--train.batch_size", 1, names=["must be at least 2", "got 1"])
    refused(*words, "--data", scenes, "--model.name", "vit_tiny_patch16_224", "--model.dims", "null",
            "--model.head_dim", "null", names=["strides 16, 16, 16"])  # fmt: skip
    refused(*words, "--data", scenes, "--segmenter.frozen_stages", 9, names=["frozen_stages=9"])
    refused(*words, "--data", scenes, "--image.slide", 16, "--image.stride", 20, names=["stride=20"])
    refused(*words, "--data", scenes, "--init", "none.safetensors", names=["none.safetensors"])
    shutil.copytree(scenes, tmp_path / "data")
    Image.new("RGB", (64, 48)).save(tmp_path / "data" / "annotations" / "train" / "00000.png")
    refused(*words, "--data", "data", names=["00000.png", "not labels"])
    (tmp_path / "data" / "annotations" / "train" / "00000.png").unlink()
    refused(*words, "--data", "data", names=["00000.png", "no label"])


@pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
def test_other_networks_of_timm_train_and_are_read_again(sola, scenes, name):
    words = [*TINY, "--data", scenes, "--out", "r", "--model.name", name, "--train.steps", 1]
    assert sola(*words, "--model.dims", "null", "--model.head_dim", "null", "--train.warmup_steps", 0).code == 0
    said = sola("predict", scenes / "images" / "val" / "00000.png", "--checkpoint", "r", "--json")
    assert json.loads(said.out)["model"] == name


def test_a_network_for_one_size_is_refused_before_anything_is_written(refused, scenes):
    words = [*TINY, "--data", scenes, "--out", "run", "--model.dims", "null", "--model.head_dim", "null"]
    refused(*words, "--model.name", "hiera_tiny_224", names=["hiera_tiny_224", "not take images of 45x67 pixels"])
