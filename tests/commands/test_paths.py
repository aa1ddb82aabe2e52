# SPDX-License-Identifier: Apache-2.0
"""Paths on a command line that are empty, of the wrong kind or not accessible: option, rule and fix are named."""

import os

import pytest
from small import TINY

from sola_vision import cli


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["predict", "", "--checkpoint", "RUN"], "an argument ''"),
        (["predict", "photo.png", "--checkpoint", ""], "--checkpoint ''"),
        (["predict", "photo.png", "--checkpoint="], "--checkpoint ''"),
        (["predict", "--checkpoint", "RUN", ""], "an argument ''"),
        (["eval", "--checkpoint", "RUN", "--data", ""], "--data ''"),
        (["eval", "--checkpoint", "RUN", "--data", "DATA", "--out", ""], "--out ''"),
        (["explain", "", "--checkpoint", "RUN"], "an argument ''"),
        (["export", "", "--format", "onnx", "--out", "a.onnx"], "an argument ''"),
        ([*TINY, "--data", ""], "--data ''"),
        ([*TINY, "--data", "DATA", "--init", ""], "--init ''"),
        ([*TINY, "--data=DATA", "--out="], "--out ''"),
        (["cost", "sola_nano", "--plot", ""], "--plot ''"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_an_empty_argument_is_refused(refused, data, trained, words, option):
    places = {"DATA": data, "RUN": trained}
    refused(*(places.get(word, word) for word in words), names=[f"sola: {option} is empty", "shell variable"])


@pytest.mark.parametrize("verb", ["train", "study", "search"])
def test_a_run_does_not_begin_with_a_path_that_it_cannot_store(refused, data, verb):
    words = {"train": TINY, "study": ["study", "table2"], "search": ["search", "--budget", "1G"]}[verb]
    names = [r"--out 'r\udcf6' has bytes that are not utf-8", "rename that file or folder"]
    refused(*words, "--data", data, "--out", "r\udcf6", names=names)
    refused(*words, "--data=d\udcf6", names=["--data 'd"])


def test_no_bridges_may_be_asked_for(sola):
    assert sola("cost", "sola_nano", "--size", 32, "--bridges", "").code == 0


@pytest.mark.parametrize("out", ["taken", "taken/below", "taken/far/below"])
@pytest.mark.parametrize("verb", ["train", "eval"])
def test_a_file_where_a_folder_has_to_be(refused, tmp_path, data, trained, verb, out):
    (tmp_path / "taken").write_text("mine")
    words = [*TINY] if verb == "train" else ["eval", "--checkpoint", trained]
    names = [f"--out {out}: taken is a file, but must be a folder; use another path"]
    refused(*words, "--data", data, "--out", out, names=names)


def test_a_file_where_a_folder_has_to_be_is_reported_before_the_work(refused, tmp_path, trained):
    (tmp_path / "taken").write_text("mine")
    words = ["--checkpoint", trained, "--data", "nowhere", "--out", "taken"]
    refused("eval", *words, names=["--out taken: taken is a file"])
    refused("eval", "--results", "R", "--annotations", "T", "--out", "taken", names=["--out taken: taken is a file"])
    words = ["--predictions", "P", "--annotations", "T", "--classes", 3, "--ignore", 0, "--out", "taken"]
    refused("eval", *words, names=["--out taken: taken is a file"])


@pytest.mark.parametrize("option", ["--csv", "--plot"])
def test_a_folder_where_a_file_has_to_be(refused, tmp_path, option):
    (tmp_path / "a.png").mkdir()
    refused(
        "cost",
        "sola_nano",
        "--size",
        32,
        option,
        "a.png",
        names=[f"{option} a.png: this is a folder; give the path of a file"],
    )


@pytest.mark.parametrize(
    ("error", "words", "says"),
    [
        (
            PermissionError(13, os.strerror(13), "run/a"),
            ["--out", "run"],
            "--out run: run/a: permission denied; change",
        ),
        (PermissionError(13, os.strerror(13), "run/a"), ["--data", "."], "run/a: permission denied; change its"),
        (
            OSError(28, os.strerror(28), "run/eval/b"),
            ["--data=run", "--out=run/eval"],
            "--out run/eval: run/eval/b: no sp",
        ),
        (
            OSError(28, "cannot write a checkpoint; make room", "run/b"),
            [],
            "run/b: cannot write a checkpoint; make room",
        ),
        (FileNotFoundError(2, os.strerror(2), b"nowhere.txt"), ["nowhere.txt"], "nowhere.txt: no such file"),
        (FileNotFoundError("nowhere: no such image"), ["--data", "nowhere"], "nowhere: no such image"),
    ],
)
def test_errors_of_the_operating_system_are_described(error, words, says):
    assert cli._describe(error, words).startswith(says)
