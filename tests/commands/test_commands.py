# SPDX-License-Identifier: Apache-2.0
"""Valid commands: files, output and numbers of train, eval and predict; a killed run resumes to the same bits."""

import csv
import json
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
from safetensors.torch import load_file, save_file
from small import CLASSES, TINY, python, write_images

from sola_vision.commands.options import parse_run
from sola_vision.tasks import load_checkpoint

VAL = {name: 1 + label % 4 for label, name in enumerate(CLASSES)}


def _records(folder, *without):
    """The records of metrics.jsonl without their times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    clocks = {"seconds", "images_per_second"}
    return [{name: value for name, value in json.loads(line).items() if name not in clocks} for line in lines]


def _best(folder):
    """The metadata and the bytes of the weights, since safetensors writes its header in no fixed order."""
    with safe_open(folder / "best.safetensors", "pt") as file:
        return file.metadata(), {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118 - no mapping


# train ---------------------------------------------------------------------------------------------------------------
def test_train_leaves_a_whole_folder(trained):
    names = {path.name for path in trained.iterdir() if not path.name.startswith("events.")}
    assert names == {"config.yaml", "metrics.jsonl", "last", "best.safetensors", "summary.json", "curve.png"}
    assert list(trained.glob("events.*"))
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["recipe"] == "digits"
    assert (config["model"]["dims"], config["train"]["epochs"], config["image"]["size"]) == ([8, 16, 32, 32], 1, 32)
    summary = json.loads((trained / "summary.json").read_text())
    assert {"top1", "top5", "loss", "best", "seconds", "hardware", "command", "commit"} <= summary.keys()
    assert summary["steps"] == 6
    kinds = [record["kind"] for record in _records(trained)]
    assert kinds == ["train"] * 6 + ["eval"]
    assert Image.open(trained / "curve.png").size[0] > 300
    with safe_open(trained / "best.safetensors", "pt") as file:
        assert json.loads(file.metadata()["classes"]) == CLASSES


def test_config_file_runs_it_again_to_the_bit(sola, tmp_path, trained):
    said = sola("train", "--config", trained / "config.yaml", "--out", "other", "--json")
    assert said.code == 0
    assert json.loads(said.out)["steps"] == 6  # one JSON document and nothing else
    assert _best(tmp_path / "other") == _best(trained)
    assert _records(tmp_path / "other") == _records(trained)
    assert (tmp_path / "other" / "config.yaml").read_text() == (trained / "config.yaml").read_text()


def test_seed_decides_the_initial_weights(sola, tmp_path, data, trained):
    slow = ["--data", data, "--train.lr", 1e-12, "--train.min_lr", 0]
    for out, seed in (("a", 0), ("b", 1), ("c", 0)):
        assert sola(*TINY, *slow, "--out", out, "--train.seed", seed).code == 0
    a, b, c = (load_file(tmp_path / out / "best.safetensors")["head.fc.weight"] for out in "abc")
    assert torch.allclose(a, c, atol=1e-6)
    assert not torch.allclose(a, b, atol=1e-3)


@pytest.mark.parametrize("has", [True, False])
def test_a_cpu_without_bfloat16_is_named(sola, data, monkeypatch, has):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has)
    said = sola(*TINY, "--data", data, "--out", "run", "--train.steps", 1, "--train.amp", "bf16")
    assert said.code == 0
    assert ("--train.amp none" in said.err) != has


@pytest.mark.parametrize("config_at", [0, 1])
def test_print_config_shows_the_whole_and_the_command_line_wins(sola, capsys, tmp_path, config_at):
    (tmp_path / "mine.yaml").write_text("train:\n  lr: 0.125\n  epochs: 77\n")
    words = ["--train.lr=0.25"]
    words.insert(config_at, "--config=mine.yaml")
    with pytest.raises(SystemExit):
        sola("train", "few_images", *words, "--print_config")
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["train"]["lr"], shown["train"]["epochs"]) == (0.25, 77)
    assert (shown["model"]["name"], shown["image"]["size"]) == ("sola_nano", 128)
    assert {"schedule", "bridges", "dims"} <= shown["model"].keys()
    (tmp_path / "shown.yaml").write_text(yaml.safe_dump(shown))
    with pytest.raises(SystemExit):  # and is a --config file again
        sola("train", "--config", "shown.yaml", "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["train"] == shown["train"]


def test_any_network_of_timm_trains_and_is_read_again(sola, tmp_path, data):
    for name in ("resnet18", "vit_tiny_patch16_224"):
        words = [*TINY, "--data", data, "--out", name, "--model.name", name, "--model.dims", "null"]
        assert sola(*words, "--train.steps", 1).code == 0
        said = sola("predict", data / "val" / "ant", "--checkpoint", name, "--json")
        assert json.loads(said.out)["model"] == name
    said = sola("eval", "--checkpoint", "vit_tiny_patch16_224", "--data", data, "--size", 64)
    assert (said.code, said.out) == (2, "")


def test_init_with_other_classes_and_size_says_so(sola, tmp_path, trained):
    write_images(tmp_path / "birds", ["auk", "emu", "owl"], train=3)
    best, still = trained / "best.safetensors", ("--train.lr", 1e-9, "--train.min_lr", 0)
    said = sola(*TINY, "--data", "birds", "--out", "run", "--init", best, "--image.size", 48, *still)
    assert said.code == 0
    line = next(line for line in said.err.splitlines() if str(best) in line)
    assert "position embedding 8x8 interpolated to 12x12" in line
    assert "head.fc.weight 3x32 newly initialised" in line
    before, after = load_file(best), load_file(tmp_path / "run" / "best.safetensors")
    assert torch.allclose(before["stem.proj.weight"], after["stem.proj.weight"], atol=1e-5)


def test_init_with_as_many_other_classes_starts_with_a_fresh_head(sola, tmp_path, trained):
    write_images(tmp_path / "birds", [f"bird {n}" for n in range(7)], train=1)
    said = sola(*TINY, "--data", "birds", "--out", "run", "--init", trained)
    assert said.code == 0
    assert "head.fc.weight 7x32 newly initialised" in said.err


# resuming ------------------------------------------------------------------------------------------------------------
LONGER = [
    "--train.epochs",
    3,
    "--train.save_steps",
    4,
    "--image.mixup",
    0.5,
    "--train.batch_size",
    6,
    "--train.ema",
    0.9,
]


def test_killed_run_ends_with_the_same_bits(sola, tmp_path, data):
    words = [*TINY, "--data", data, *LONGER]
    assert sola(*words, "--out", "whole").code == 0
    ended = python(Path(__file__).with_name("killed.py"), 11, *words, "--out", "killed")
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert sola(*words, "--out", "killed").code == 2  # not without --resume
    # --out alone is enough: config.yaml has the rest
    said = sola("train", "--resume", "--out", "killed", "--json")
    assert said.code == 0
    assert json.loads(said.out)["steps"] == 21
    assert _best(tmp_path / "killed") == _best(tmp_path / "whole")
    assert _records(tmp_path / "killed") == _records(tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_starts_from_init_again(sola, tmp_path, data, trained):
    words = [*TINY, "--data", data, "--init", trained]
    assert sola(*words, "--out", "whole").code == 0
    ended = python(Path(__file__).with_name("killed.py"), 3, *words, "--out", "killed")
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert sola("train", "--resume", "--out", "killed").code == 0
    assert _best(tmp_path / "killed") == _best(tmp_path / "whole")
    assert _records(tmp_path / "killed") == _records(tmp_path / "whole")


@pytest.mark.slow
def test_two_killed_processes_end_with_the_same_bits(tmp_path, data):
    words = [*TINY, "--data", data, *LONGER, "--train.batch_size", 12]

    def torchrun(*script):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        return python("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", port, *script)

    assert torchrun("-m", "sola_vision", *words, "--out", "whole").returncode == 0
    assert torchrun(Path(__file__).with_name("killed.py"), 6, *words, "--out", "killed").returncode != 0
    assert torchrun("-m", "sola_vision", "train", "--resume", "--out", "killed").returncode == 0
    assert _best(tmp_path / "killed") == _best(tmp_path / "whole")
    assert _records(tmp_path / "killed") == _records(tmp_path / "whole")


def test_resume_of_a_finished_run_changes_nothing(sola, tmp_path, trained):
    shutil.copytree(trained, tmp_path / "run")
    assert sola("train", "digits", "--resume", "--out", "run").code == 0
    assert _best(tmp_path / "run") == _best(trained)
    assert _records(tmp_path / "run") == _records(trained)


def test_what_a_resumed_run_was_asked_for_is_kept(sola, tmp_path, trained):
    shutil.copytree(trained, tmp_path / "run")
    kept = tmp_path / "run" / "config.yaml"
    begun = kept.read_text()
    # a run that is refused leaves it
    assert sola("train", "--resume", "--out", "run", "--train.lr", 0.5, "--train.optimizer", "sgd").code == 2
    assert kept.read_text() == begun
    for words in (["--train.epochs", 2, "--train.lr", 0.5], ["--train.epochs", 3]):
        assert sola("train", "--resume", "--out", "run", *words).code == 0
    train = yaml.safe_load(kept.read_text())["train"]
    assert train == yaml.safe_load(begun)["train"] | {"epochs": 3, "lr": 0.5}
    said = sola("train", "--resume", "--out", "run")
    assert said.code == 0
    assert "another configuration" not in said.err


def test_every_field_that_a_resumed_run_changes_is_named_once(sola, tmp_path, data, trained):
    shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(data, tmp_path / "moved")
    words = ["--data", "moved", "--image.hflip", 0.25, "--train.epochs", 2, "--train.workers", 1]
    said = sola("train", "--resume", "--out", "run", *words)
    assert said.code == 0
    named = [line for line in said.err.splitlines() if "another configuration" in line]
    assert [line.partition(": ")[2] for line in named] == [
        f"data=moved (was {data}), image.hflip=0.25 (was 0.0)",
        "epochs=2 (was 1)",
    ]
    assert "another configuration" not in sola("train", "--resume", "--out", "run").err


@pytest.mark.parametrize(
    ("yaml_file", "words", "out"),
    [
        ("recipe: digits\ntrain:\n  epochs: 7\n", ["--resume"], "runs/digits"),
        ("recipe: digits\nout: mine\n", ["--resume"], "mine"),
        ("recipe: digits\nresume: true\n", [], "runs/digits"),
        ("out: mine\nresume: true\n", ["--out", "other"], "other"),
    ],
)
def test_a_run_goes_on_as_it_began_wherever_recipe_folder_and_resume_are_said(tmp_path, yaml_file, words, out):
    first = parse_run(["digits", "--train.lr", "0.125"])
    (tmp_path / out).mkdir(parents=True)
    (tmp_path / out / "config.yaml").write_text(first.text)
    (tmp_path / "my.yaml").write_text(yaml_file)
    again = parse_run(["--config", "my.yaml", *words])
    assert (again.resume, again.out, again.configuration.train.lr) == (True, Path(out), 0.125)
    assert again.configuration.train.epochs == (7 if "epochs" in yaml_file else first.configuration.train.epochs)


# eval ----------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def by_hand(data, trained):
    """Logits [N, classes] and labels [N] of the held-out images, computed without the package's data loading."""
    model = load_checkpoint(trained).model
    images, labels = [], []
    for label, name in enumerate(CLASSES):
        for file in sorted((data / "val" / name).iterdir()):
            pixels = np.asarray(Image.open(file), dtype=np.float32) / 255
            pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
            images.append(torch.tensor(pixels, dtype=torch.float32).permute(2, 0, 1))
            labels.append(label)
    with torch.no_grad():
        return model(torch.stack(images)).double().numpy(), np.array(labels)


def test_eval_numbers_are_right(sola, tmp_path, data, trained, by_hand):
    said = sola(
        "eval", "--checkpoint", trained, "--data", data, "--workers", 0, "--batch-size", 5, "--json", "--out", "e"
    )
    result = json.loads(said.out)
    logits, labels = by_hand
    order = np.argsort(-logits, axis=1)
    log_probability = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert (said.code, said.err) == (0, "")
    assert result["images"] == len(labels) == sum(VAL.values())
    assert result["top1"] == pytest.approx(100 * np.mean(order[:, 0] == labels))
    assert result["top5"] == pytest.approx(100 * np.mean((order[:, :5] == labels[:, None]).any(1)))
    assert result["top5"] >= result["top1"]
    assert result["loss"] == pytest.approx(-log_probability[np.arange(len(labels)), labels].mean(), rel=1e-5)
    for label, row in enumerate(result["classes"]):
        mine, named = labels == label, order[:, 0] == label
        assert (row["class"], row["images"]) == (CLASSES[label], VAL[CLASSES[label]])
        assert row["recall"] == pytest.approx(100 * np.mean(named[mine]))
        assert row["precision"] == (pytest.approx(100 * np.mean(mine[named])) if named.any() else None)
    summary = json.loads((trained / "summary.json").read_text())
    assert result["top1"] == summary["best"]["top1"]
    assert json.loads((tmp_path / "e" / "eval.json").read_text()) == result
    with (tmp_path / "e" / "classes.csv").open() as file:
        assert [row["class"] for row in csv.DictReader(file)] == CLASSES
    for picture in ("confusion.png", "predictions.png"):
        Image.open(tmp_path / "e" / picture).verify()


def test_eval_tells_people_and_writes_beside_the_checkpoint(sola, tmp_path, data, trained):
    shutil.copytree(trained, tmp_path / "run")
    said = sola("eval", "--checkpoint", "run/best.safetensors", "--data", data, "--split", "train", "--size", 40)
    assert said.code == 0
    assert "top-1" in said.out
    assert "images/s" in said.out
    assert all(name in said.out for name in CLASSES)
    assert (tmp_path / "run" / "eval" / "eval.json").exists()


# predict -------------------------------------------------------------------------------------------------------------
def test_predict_names_the_classes_of_the_checkpoint(sola, data, trained, by_hand):
    logits, labels = by_hand
    index = int(np.flatnonzero(labels == 2)[0])
    file = data / "val" / "cat" / "0.png"
    result = json.loads(sola("predict", file, "--checkpoint", trained, "--top", 99, "--json").out)
    (row,) = result["images"]
    probability = np.exp(logits[index]) / np.exp(logits[index]).sum()
    order = np.argsort(-probability)
    assert row["image"] == str(file)
    assert [guess["class"] for guess in row["classes"]] == [CLASSES[k] for k in order]
    assert [guess["probability"] for guess in row["classes"]] == pytest.approx(list(probability[order]), rel=1e-4)
    said = sola("predict", file, "--checkpoint", trained)
    assert CLASSES[order[0]] in said.out
    assert f"{100 * probability[order[0]]:.1f} %" in said.out
    assert "│ 0.png " in said.out  # not the path, which would be wrapped over several lines


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_predict_leaves_out_a_broken_image_and_names_it(sola, tmp_path, data, trained, words):
    shutil.copytree(data / "val", tmp_path / "photos")
    (tmp_path / "photos" / "cat" / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "photos" / "notes.txt").write_text("no image and not asked about")
    said = sola("predict", "photos", "--checkpoint", trained, "--batch-size", 4, *words)
    assert said.code == 0
    assert said.err.count("\n") == 1
    assert "photos/cat/broken.jpg" in said.err
    if words:
        result = json.loads(said.out)
        assert len(result["images"]) == sum(VAL.values())
        assert len(result["unreadable"]) == 1
    else:
        assert "gnu/0.png" in said.out
        assert "broken.jpg" not in said.out


def test_predict_of_a_network_that_diverged_is_json_and_says_so(sola, tmp_path, data, trained):
    shutil.copytree(trained, tmp_path / "run")
    best = tmp_path / "run" / "best.safetensors"
    with safe_open(best, "pt") as file:
        said = file.metadata()
    save_file({name: tensor * float("nan") for name, tensor in load_file(best).items()}, best, said)
    words = ["predict", data / "val" / "cat" / "0.png", "--checkpoint", "run"]
    result = json.loads(sola(*words, "--json").out, parse_constant=pytest.fail)
    assert [guess["probability"] for guess in result["images"][0]["classes"]] == [None] * 3
    assert "not a number" in sola(*words).out


def test_predict_leaves_hidden_folders_alone(sola, tmp_path, data, trained):
    shutil.copytree(data / "val" / "cat", tmp_path / "photos" / "shown")
    shutil.copytree(data / "val" / "cat", tmp_path / "photos" / ".thumbnails")
    result = json.loads(sola("predict", "photos", "--checkpoint", trained, "--json").out)
    assert len(result["images"]) == VAL["cat"]
    result = json.loads(sola("predict", tmp_path / "photos" / ".thumbnails", "--checkpoint", trained, "--json").out)
    assert len(result["images"]) == VAL["cat"]  # a hidden folder that is given explicitly is searched


# the program ---------------------------------------------------------------------------------------------------------
def test_command_line_itself_needs_no_torch():
    """Importing the package does need it, to register the names with timm."""
    program = (
        "import sys, importlib.util as u; sys.modules['torch'] = None; "
        "spec = u.spec_from_file_location('cli', sys.argv[1]); cli = u.module_from_spec(spec); "
        "spec.loader.exec_module(cli); sys.exit(cli.main(['--help']) + (cli.main(['x']) != 2))"
    )
    from sola_vision import cli

    ended = python("-c", program, cli.__file__)
    assert ended.returncode == 0, ended.stderr
    assert "train" in ended.stdout


def test_import_prints_nothing():
    ended = python("-W", "always", "-c", "import sola_vision")
    noise = [line for line in ended.stderr.splitlines() if "sola" in line]
    assert (ended.returncode, ended.stdout, noise) == (0, "", [])


@pytest.mark.parametrize("verb", ["train", "eval", "predict"])
def test_help_explains(sola, capsys, verb):
    with pytest.raises(SystemExit) as end:
        sola(verb, "--help")
    out = capsys.readouterr().out
    assert end.value.code == 0
    assert "--checkpoint" in out or "few_images" in out
    assert sola("--help").code == 0
    assert verb in sola().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "few_images"], ["side in pixels of training crops", "alpha of Mixup"]),
        (["bench", "op"], ["Measure the operator", "number of rounds (default: 7)"]),
        (["bench", "model"], ["Measure networks", "images at once (default: 1)"]),
        (["eval"], ["batch size (default: 64)", "(default: auto)"]),
        (["cost"], ["number of threads (default: 2)"]),
    ],
)
def test_help_says_what_options_are_and_their_defaults(sola, capsys, words, says):
    with pytest.raises(SystemExit):
        sola(*words, "--help")
    out = " ".join(capsys.readouterr().out.split())
    assert [text for text in says if text not in out] == []
    assert "(default: None)" not in out
