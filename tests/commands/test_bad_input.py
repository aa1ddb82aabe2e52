# SPDX-License-Identifier: Apache-2.0
"""Invalid input ends with one line that names it and exit code 2; nothing is printed, written or lost."""

import errno
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zlib

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small import TINY, python, write_images

from sola_vision.cli import main
from sola_vision.engine import checkpoint as checkpoints


def _bomb(path):
    """The header of a PNG of 100,000 x 100,000 pixels, which would be 30 GB as RGB."""

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b""))
    return path


def _train(data, *words):
    return (*TINY, "--data", data, "--out", "run", *words)


# commands and options ------------------------------------------------------------------------------------------------
FIELDS = [
    (["--train.lr", "x"], ["--train.lr", "'x'", "float"]),
    (["--train.epoch", "5"], ["--train.epoch 5 (did you mean --train.epochs?)"]),
    (["--dat", "x"], ["--dat x (did you mean --data?)"]),
    (["--train.lrr=1"], ["--train.lrr=1 (did you mean --train.lr?)", "see `sola train RECIPE --help`"]),
    (["--trian.lr", "1"], ["--trian.lr 1 (did you mean --train.lr?)"]),
    (["--train.lr", "nan"], ["--train.lr", "nan"]),
    (["--train.lr", "-1"], ["--train.lr=-1"]),
    (["--train.epochs", "1.5"], ["--train.epochs", "1.5", "int"]),
    (["--train.epochs", "0"], ["epochs=0"]),
    (["--train.amp", "fp8"], ["--train.amp", "fp8", "bf16"]),
    (["--train.optimizer", "adamm"], ["--train.optimizer='adamm'"]),
    (["--train.device", "gpu"], ["gpu"]),
    (["--train.batch_size", "700"], ["--train.batch_size=700", "42"]),
    (["--train.warmup_epochs", "70"], ["--train.warmup_epochs=70 (420 steps)", "for example to 0.1"]),
    (["--train.warmup_steps", "6"], ["--train.warmup_steps=6", "run of 6 steps", "for example to 0"]),
    (["--train.strategy", "fsdp"], ["fsdp", "torchrun"]),
    (["--image.mixup", "0.5"], ["batch of 7", "image.mixup 0"]),
    (["--image.size", "0"], [": --image.size=0"]),
    (["--image.scale", "[0.5,0.2]"], ["--image.scale=(0.5, 0.2)"]),
    (["--image.mean", "[1,2]"], ["--image.mean '[1, 2]' is invalid: expected three numbers, such as [0.5,0.5,0.5]"]),
    (["--image.std", "[0.2,.nan,0.2]"], ["--image.std=(0.2, nan, 0.2)"]),
    (["--image.mean", "[.nan,0,0]"], ["--image.mean=(nan, 0"]),
    (["--train.lr", "1e-6"], ["--train.min_lr=1e-05", "above lr=1e-06"]),
    (["--train.warmup_epochs", ".inf"], ["--train.warmup_epochs=inf"]),
    (["--train.batch_size", "43", "--image.mixup", "0.5"], ["--train.batch_size=43", "42"]),
    (["--image.mean", "1"], ["--image.mean '1' is invalid: expected three numbers, such as [0.5,0.5,0.5]"]),
    (["--image.scale", "[a,1]"], ["expected two numbers, such as [0.5,1.0], or null"]),
    (["--image.auto_augment", "strong"], ["auto_augment strong"]),
    (["--model.dims", "1,2"], ["--model.dims", "1,2", "[int, int, ...]"]),
    (["--model.dims", "[8,a]"], ["--model.dims", "'a'"]),
    (["--model.dims", "[8,16]"], ["(8, 16)", "4 stages"]),
    (["--model.schedule", "LL/LX/LLSLLS/LS"], ["position 5", "'X'", "S is softmax"]),
    (["--model.bridges", "3.3>1.2"], ["3.3>1.2", "forward"]),
    (["--model.name", "sola_huge"], ["sola_huge"]),
    (["--model", "5"], ["--model '5'", "section of fields", "--model.name VALUE"]),
    (["--image", "nope.yaml"], ["--image 'nope.yaml'", "section of fields", "--image.size VALUE"]),
    (["--model.name", "hf-hub:some/body"], ["hf-hub:some/body"]),
    (["--model.name", "resnet18"], ["resnet18", "dims"]),
    (["--init", "nowhere.safetensors"], ["nowhere.safetensors"]),
    (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    (["--resume"], ["run", "no run to resume"]),
    (["--out"], ["--out"]),
    (["digits2"], ["digits2"]),
]


@pytest.mark.parametrize(("words", "names"), FIELDS, ids=lambda value: " ".join(value))
def test_train_refuses_option(refused, data, words, names):
    refused(*_train(data, *words), names=names)


def test_unknown_command_and_recipe_list_the_known_ones(refused, data):
    refused("trian", names=["'trian' is not a command (did you mean train?)", "eval", "predict"])
    refused("xyz", names=["'xyz' is not a command;"])
    refused("train", "imagenet_huge", "--data", data, names=["'imagenet_huge'", "imagenet_tiny", "digits"])
    refused("train", "few_image", "--data", data, names=["'few_image' is unknown (did you mean few_images?)"])
    refused("train", names=["recipe", "digits"])
    refused("train", "imagenet_tiny", names=["sola: train imagenet_tiny needs --data"])


CONFIGS = {
    "a: [1,\n b: }": ["is not YAML"],
    "just words": ["just words"],
    "recipe: digits\ntrain:\n  lrr: 1\n": ["train.lrr", "weight_decay"],
    "recipe: digits\nmodle: {}\n": ["'modle'"],
    "recipe: digits\ntrain: 3\n": ["train", "3"],
    "recipe: digits\ntrain:\n  lr: fast\n": ["train.lr", "fast"],
    "recipe: huge\n": ["'huge'"],
    "train: !!python/object/apply:os.mkdir [run]\n": ["is not YAML"],
    "\0": ["is not YAML"],
}


@pytest.mark.parametrize("text", CONFIGS)
def test_train_refuses_config_file(refused, tmp_path, data, text):
    (tmp_path / "bad.yaml").write_text(text)
    names = CONFIGS[text] if "fast" in text or "huge" in text else ["bad.yaml", *CONFIGS[text]]
    refused("train", "--config", "bad.yaml", "--data", data, "--out", "run", names=names)


ARGUMENTS = [
    (["eval"], ["--checkpoint", "--data"]),
    (["eval", "--checkpoint", "RUN"], ["--data"]),
    (["eval", "--checkpoint", "RUN", "--data", "DATA", "--size", "big"], ["--size", "'big'"]),
    (["eval", "--checkpoint", "RUN", "--data", "DATA", "--size", "0"], ["size=0"]),
    (["eval", "--checkpoint", "RUN", "--data", "DATA", "--siz", "32"], ["--siz"]),
    (["eval", "--checkpoint", "RUN", "--data", "DATA", "--batch-size", "0"], ["--batch-size 0"]),
    (["eval", "--checkpoint", "RUN", "--data", "DATA", "--split", "dev"], ["dev/"]),
    (["eval", "--checkpoint", "RUN", "--data", "nowhere"], ["nowhere"]),
    (["eval", "--checkpoint", "nowhere", "--data", "DATA"], ["nowhere"]),
    (["predict"], ["source", "--checkpoint"]),
    (["predict", "DATA", "--checkpoint", "RUN", "--top", "0"], ["sola: --top 0 must be at least 1\n"]),
    (["predict", "DATA", "--checkpoint", "RUN", "--top", "all"], ["--top", "'all'"]),
    (["predict", "nowhere.png", "--checkpoint", "RUN"], ["nowhere.png"]),
    (["predict", "DATA", "--checkpoint", "nowhere"], ["nowhere"]),
]


@pytest.mark.parametrize(("words", "names"), ARGUMENTS, ids=lambda value: " ".join(value))
def test_eval_and_predict_refuse_argument(refused, data, trained, words, names):
    places = {"DATA": data, "RUN": trained}
    refused(*(places.get(word, word) for word in words), names=names)


def test_process_ends_with_two_and_one_line():
    ended = python("-m", "sola_vision", "train", "digits", "--train.lr", "x")
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1), ended.stderr


@pytest.mark.parametrize("command", [("cost", "sola_nano", "--size", "32", "--json"), ("--help",)])
def test_a_closed_pipe_is_no_error(command):
    """As in `sola cost ... | head`."""
    command = [sys.executable, "-m", "sola_vision", *command]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


# data ----------------------------------------------------------------------------------------------------------------
def test_train_refuses_folder(refused, tmp_path, data):
    refused(*TINY, "--data", "nowhere", "--out", "run", names=["nowhere"])
    (tmp_path / "bare" / "train").mkdir(parents=True)
    refused(*TINY, "--data", "bare", "--out", "run", names=["bare/train", "no class"])
    shutil.copytree(data, "hollow")
    (tmp_path / "hollow" / "train" / "hen").mkdir()
    refused(*TINY, "--data", "hollow", "--out", "run", names=["hollow/train/hen", "without images"])
    (tmp_path / "words.txt").write_text("ant bee")
    refused(*TINY, "--data", "words.txt", "--out", "run", names=["words.txt"])
    shutil.copytree(data, "more")
    (tmp_path / "more" / "val" / "ant").rename(tmp_path / "more" / "val" / "auk")
    refused(*TINY, "--data", "more", "--out", "run", names=["more/val/auk", "'auk'"])


def test_one_class_is_no_training_set_but_can_be_evaluated(refused, sola, tmp_path, trained):
    write_images(tmp_path / "single", ["bee"])
    refused(
        *TINY, "--data", "single", "--out", "run", names=["single", "'bee' is its only class", "next to train/bee/"]
    )
    said = sola("eval", "--checkpoint", trained, "--data", "single", "--out", "out", "--workers", 0, "--json")
    assert json.loads(said.out)["images"] == 1


def test_train_names_counts_and_skips_one_corrupt_image(sola, tmp_path, data):
    shutil.copytree(data, "images")
    (tmp_path / "images" / "train" / "bee" / "3.png").write_text("no image")
    said = sola(*_train("images", "--json"))
    assert said.code == 0
    assert json.loads(said.out)["images_skipped"] == {"training": 1, "evaluation": 0}
    assert said.err.count("images/train/bee/3.png") == 1


def test_train_stops_above_one_percent_of_corrupt_images(sola, tmp_path, data):
    shutil.copytree(data, "images")
    (tmp_path / "images" / "train" / "bee" / "3.png").write_text("no image")
    _bomb(tmp_path / "images" / "train" / "cat" / "5.png")
    said = sola(*_train("images"))
    assert (said.code, said.out) == (2, "")
    assert "2 of the 42 training images" in said.err.splitlines()[-1]
    assert ".png" in said.err.splitlines()[-1]


@pytest.mark.parametrize("make", [lambda path: path.write_text("no image"), _bomb, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("words", [[], ["--json"]])
def test_predict_refuses_file_that_is_no_image(refused, tmp_path, trained, make, words):
    make(tmp_path / "photo.png")
    refused("predict", "photo.png", "--checkpoint", trained, *words, names=["photo.png"])


def test_predict_refuses_folder_without_a_readable_image(refused, tmp_path, trained):
    (tmp_path / "photos").mkdir()
    refused("predict", "photos", "--checkpoint", trained, names=["photos"])
    (tmp_path / "photos" / "one.jpg").write_text("no image")
    (tmp_path / "photos" / "two.jpg").mkdir()
    refused("predict", "photos", "--checkpoint", trained, names=["photos/one.jpg"])


def test_eval_names_what_it_skips_and_stops_above_one_percent(sola, refused, tmp_path, data, trained):
    shutil.copytree(data, "images")
    broken = tmp_path / "images" / "val" / "bee" / "0.png"
    broken.write_text("no image")
    said = sola("eval", "--checkpoint", trained, "--data", "images", "--out", "out", "--workers", 0, "--json")
    result = json.loads(said.out)
    assert said.code == 0
    assert "images/val/bee/0.png" in said.err
    assert (result["images"], result["images_skipped"]) == (15, 1)
    assert {row["class"]: row["images"] for row in result["classes"]}["bee"] == 1
    (tmp_path / "images" / "val" / "cat" / "0.png").write_text("no image")
    refused(
        *("eval", "--checkpoint", trained, "--data", "images", "--out", "out", "--workers", 0),
        names=["2 of the 16", "max_corrupt"],
    )


# checkpoints ---------------------------------------------------------------------------------------------------------
def test_checkpoint_of_other_classes(refused, sola, tmp_path, data, trained):
    write_images(tmp_path / "birds", ["auk", "emu"])
    refused("eval", "--checkpoint", trained, "--data", "birds", names=["birds/val/auk", "'auk'", "7 known"])
    refused("eval", "--checkpoint", trained, "--data", "digits", names=["digits", "'0'", "7 known"])
    shutil.copytree(data, "renamed")
    for split in ("train", "val"):
        (tmp_path / "renamed" / split / "gnu").rename(tmp_path / "renamed" / split / "hen")
    shutil.copytree(trained, "run")
    (tmp_path / "run" / "best.safetensors").unlink()  # as before the first evaluation
    refused(*TINY, "--data", "renamed", "--out", "run", "--resume", names=["run", "'gnu'"])
    # a state of an older version does not name the classes, best.safetensors does
    shutil.copytree(trained, "older")
    state = tmp_path / "older" / "last" / "state.safetensors"
    with safe_open(state, "pt") as file:
        said = file.metadata()
    progress = json.loads(said["progress"])
    del progress["metadata"], progress["images"]
    save_file(load_file(state), state, said | {"progress": json.dumps(progress)})
    refused(*TINY, "--data", "renamed", "--out", "older", "--resume", names=["older", "'gnu'"])


def test_checkpoint_of_another_network(refused, data, trained):
    best = trained / "best.safetensors"
    refused(*_train(data, "--init", best, "--model.dims", "[16,16,32,32]"), names=[best, "resized"])
    refused(*_train(data, "--init", best, "--model.schedule", "LL/LL/LL/LS"), names=[best, "unexpected"])
    refused(*_train(data, "--init", best, "--model.name", "resnet18", "--model.dims", "null"), names=[best])


def test_damaged_checkpoint(refused, tmp_path, data, trained):
    whole = (trained / "best.safetensors").read_bytes()
    for name, content in {
        "short.safetensors": whole[: len(whole) // 2],
        "empty.safetensors": b"",
        "text.safetensors": b"weights",
        "huge.safetensors": b"\xff" * 64,
        "pickle.safetensors": pickle.dumps({"weights": 1}),
        "pickle.pth": pickle.dumps(_Trap(), protocol=2),
    }.items():
        (tmp_path / name).write_bytes(content)
        refused("eval", "--checkpoint", name, "--data", data, names=[name])
        refused("predict", data, "--checkpoint", name, names=[name])
        refused(*_train(data, "--init", name), names=[name])
    assert not (tmp_path / "sprung").exists()


class _Trap:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


METADATA = {
    "foreign": ({"format": "pt"}, "no task"),
    "no JSON": ({"model": "{"}, "metadata"),
    "no object": ({"model": "[]"}, "metadata"),
    "no name": ({"model": "{}"}, "metadata"),
    "other settings": ({"image": '{"sharpen": 1}'}, "sharpen"),
    "fetches": ({"model": '{"name": "hf-hub:some/body"}'}, "hf-hub:some/body"),
    "opens": ({"model": '{"name": "resnet18", "checkpoint_path": "trap.pth"}'}, "checkpoint_path"),
    "other classes": ({"classes": '["a", "b"]'}, "does not fit"),
    "no schedule": ({"model": '{"name": "sola_nano", "schedule": "LLQ"}'}, "Q"),
}


@pytest.mark.parametrize("case", METADATA)
def test_checkpoint_with_foreign_metadata(refused, data, trained, case):
    change, name = METADATA[case]
    with safe_open(trained / "best.safetensors", "pt") as file:
        old = file.metadata()
    new = change if case == "foreign" else {**old, **change}
    save_file(load_file(trained / "best.safetensors"), "foreign.safetensors", new)
    names = [name] if case == "no schedule" else ["foreign.safetensors", name]
    refused("eval", "--checkpoint", "foreign.safetensors", "--data", data, names=names)


def test_existing_run_is_refused_and_kept(refused, data, trained):
    shutil.copytree(trained, "run")
    refused(*_train(data), names=["run", "already holds a run", "--resume", "--out"])
    refused(*_train("nowhere"), names=["nowhere: no such folder"])


def test_a_run_that_cannot_go_on_is_refused_and_kept(refused, trained):
    shutil.copytree(trained, "run")
    words = ["train", "--resume", "--out", "run"]
    refused(*words, "--train.optimizer", "sgd", names=["'sgd'", "'adamw'", "run"])
    refused(*words, "--train.steps", 3, names=["run", "step 6", "3 steps"])


# while it runs -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("target", ["best.safetensors", "state.safetensors"])
def test_full_disk_keeps_the_old_checkpoint(sola, tmp_path, data, monkeypatch, target):
    writes = []
    save = checkpoints.save_file

    def save_until_full(tensors, path, metadata=None):
        writes.append(path)
        if path.name == target and len([p for p in writes if p.name == target]) > 1:
            path.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if path.name == target:
            kept.update({name: tensor.clone() for name, tensor in tensors.items()})
        save(tensors, path, metadata)

    kept = {}
    monkeypatch.setattr(checkpoints, "save_file", save_until_full)
    words = ["--train.epochs", 3, "--train.lr", 0.01]
    if target == "best.safetensors":  # each evaluation is better than the one before
        scores = iter([1.0, 2.0, 3.0])
        monkeypatch.setattr("sola_vision.tasks.Classification.evaluate", lambda *_: {"top1": next(scores)})
    said = sola(*_train(data, *words))
    assert (said.code, said.out) == (2, "")
    assert "No space left on device" in said.err.splitlines()[-1]
    assert target in said.err.splitlines()[-1]
    file = next((tmp_path / "run").rglob(target))
    survived = load_file(file)
    assert survived.keys() == kept.keys()
    assert all(survived[name].equal(kept[name]) for name in kept)
    assert not list((tmp_path / "run").rglob(".new*"))


def test_loss_that_is_no_number_stops_and_keeps_the_last_good_state(sola, tmp_path, data, monkeypatch):
    from sola_vision.tasks import Classification

    calls = []
    loss = Classification.loss

    def diverge(self, model, batch):
        calls.append(1)
        value, parts = loss(self, model, batch)
        return (value * float("nan") if len(calls) == 9 else value), parts

    monkeypatch.setattr(Classification, "loss", diverge)
    said = sola(*_train(data, "--train.epochs", 2))
    assert (said.code, said.out) == (1, "")
    last = said.err.splitlines()[-1]
    assert all(text in last for text in ("nan", "epoch 2", "step 9", "last good state, from step 6"))
    for name in ("best.safetensors", "last/state.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "run" / name).values())
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert sola("train", "--resume", "--out", "run").code == 0


def test_learning_rate_beyond_reason_stops_and_says_where(sola, data):
    said = sola(*_train(data, "--train.lr", "1e30"))
    assert (said.code, said.out) == (1, "")  # the input was valid
    assert "epoch 1, step 2" in said.err.splitlines()[-1]
    assert "learning rate" in said.err.splitlines()[-1]


def test_names_are_not_markup(sola, tmp_path, trained):
    odd = tmp_path / "[bold]odd [" / "[red]x[].png"
    odd.parent.mkdir()
    Image.new("RGB", (32, 32)).save(odd)
    said = sola("predict", odd.parent, "--checkpoint", trained)
    assert said.code == 0
    assert "[red]x[].png" in said.out


@pytest.mark.parametrize("text", ["DataLoader worker (pid 7) is killed by signal: Killed.", "something else"])
def test_a_killed_reader_of_images_is_one_line(capsys, monkeypatch, text):
    def run(arguments):
        raise RuntimeError(text)

    monkeypatch.setattr("sola_vision.commands.cost.run", run)
    if text.startswith("DataLoader"):
        assert main(["cost"]) == 1
        assert re.fullmatch(
            r"sola: DataLoader worker \(pid 7\) .*use fewer workers or smaller images.*\n", capsys.readouterr().err
        )
    else:
        with pytest.raises(RuntimeError, match="something else"):
            main(["cost"])


def test_a_write_that_names_no_file_says_what_to_do(capsys, monkeypatch):
    def run(arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("sola_vision.commands.cost.run", run)
    assert main(["cost"]) == 2
    assert "make room, or use another --out" in capsys.readouterr().err


def test_an_evaluation_whose_results_cannot_be_written_does_not_begin(refused, tmp_path, data, trained, monkeypatch):
    (tmp_path / "e").mkdir()

    def touch(path, *rest):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr("pathlib.Path.touch", touch)
    monkeypatch.setattr("sola_vision.commands.evaluate_classification._evaluate", lambda *rest: pytest.fail("begun"))
    refused("eval", "--checkpoint", trained, "--data", data, "--out", "e", names=["read-only file system"])
