# SPDX-License-Identifier: Apache-2.0
"""`sola bench` from the outside: tables, JSON, and one line and exit code 2 for wrong input."""

import json
import math

import pytest
import torch

from sola_vision.analysis.cost import build, count
from sola_vision.bench import accuracy
from sola_vision.tasks import describe_classifier

MODEL = ("bench", "model", "sola_nano", "--compare", "resnet18", "--size", "32", "--rounds", "1", "--no-memory")


def test_networks_as_a_table_and_as_a_file(sola, tmp_path):
    file, picture = tmp_path / "speed.json", tmp_path / "speed.png"
    said = sola(*MODEL, "--dtype", "float32", "bfloat16", "--json", file, "--plot", picture)
    assert said.code == 0
    assert "images/s" in said.out
    assert "round 1 of 1" in said.err
    document = json.loads(file.read_text())
    where = {"hardware", "cpus", "threads", "python", "torch", "timm", "commit", "command", "kernel", "protocol"}
    assert where <= set(document)
    assert document["what"] == "network"
    assert document["protocol"]["rounds"] == 1
    assert [(row["model"], row["dtype"]) for row in document["rows"]] == [
        ("sola_nano", "float32"),
        ("sola_nano", "bfloat16"),
        ("resnet18", "float32"),
        ("resnet18", "bfloat16"),
    ]
    assert len(document["ratios"]) == 2
    assert picture.stat().st_size > 0


def test_a_run_is_measured_as_it_was_trained(sola, trained):
    said = sola(*MODEL[:2], trained, "--compare", "resnet18", "--rounds", "1", "--train", "--batch-size", "2", "--json")
    run, baseline = json.loads(said.out)["rows"]
    assert (run["model"], run["height"], baseline["model"], baseline["height"]) == (str(trained), 32, "resnet18", 32)
    described = describe_classifier(trained)
    cost = count(build(described.name, (32, 32), described.num_classes, **described.arguments), (32, 32))
    assert run["gmacs"] == cost.gmacs
    assert run["peak_mib"] > run["added_mib"] > 0
    assert f" {trained.parent.name}/{trained.name} " in sola(*MODEL[:2], trained, *MODEL[3:]).out


def test_json_alone_prints_one_document(sola):
    said = sola("bench", "op", "--shape", "1x20x32", "--dtype", "float32", "--rounds", "1", "--json")
    document = json.loads(said.out)
    assert document["what"] == "operator"
    assert document["rows"][0]["shape"] == [1, 20, 32]
    assert sola("bench", "op", "--shape", "1x20x32", "--dtype", "float32", "--rounds", "1").out.count("ratios") == 1


def test_columns_without_numbers_are_left_out_and_the_others_explained(sola):
    words = ("bench", "op", "--dtype", "float32", "--rounds", "1", "--shape")
    with_attention, without = (sola(*words, shape).out for shape in ("1x20x32", "1x20x48"))
    assert " attention ┃" in with_attention
    assert " attention ┃" not in without
    for text in (with_attention, without):
        legend = text.splitlines()[-5:]
        assert [line.partition(":")[0] for line in legend] == [
            "native",
            'k + v ("a copy")',
            "attention",
            "streamed",
            "target, met",
        ]


def test_without_a_kernel_there_is_no_table_of_the_backward_alone(sola, monkeypatch):
    monkeypatch.setattr("sola_vision.ops.missing_kernel", lambda device: "not built")
    said = sola("bench", "op", "--dtype", "float32", "--rounds", "1", "--shape", "1x20x48")
    assert "native skipped: not built" in said.err
    assert "forward, microseconds" in said.out
    assert "backward, microseconds" not in said.out


def test_accuracy_as_a_table(sola):
    said = sola("bench", "op", "--accuracy", "--shape", "1x20x3", "--path", "portable")
    assert said.code == 0
    assert "w -20..200, k -50..50" in said.out


def test_an_error_that_is_no_number_is_null(sola, monkeypatch, tmp_path):
    monkeypatch.setattr(accuracy, "_worst", lambda error: math.inf)
    words = ("bench", "op", "--accuracy", "--shape", "1x20x3", "--path", "portable", "--json")
    said = sola(*words)
    assert sola(*words, tmp_path / "a.json").code == 0
    for text in (said.out, (tmp_path / "a.json").read_text()):
        row = json.loads(text, parse_constant=pytest.fail)["rows"][0]
        assert (row["forward"], row["gradients"]["w"], row["met"]) == (None, None, False)


def test_threads_are_those_of_the_option_and_only_for_the_run(sola):
    before = torch.get_num_threads()
    said = sola("bench", "op", "--shape", "1x9x8", "--dtype", "float32", "--rounds", "1", "--threads", "2", "--json")
    assert json.loads(said.out)["threads"] == 2
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("model", "sola_huge"), ["'sola_huge' is unknown"]),
        (("model", "--compare", "resnet1800"), ["'resnet1800' is unknown"]),
        (("model", "--size", "12x"), ["'12x'", "HEIGHTxWIDTH"]),
        (("model", "--size", "0"), ["'0'"]),
        (("model", "--rounds", "0"), ["--rounds 0", "at least 1"]),
        (("model", "--batch-size", "-1"), ["--batch-size -1", "at least 1"]),
        (("model", "--threads", "0"), ["--threads 0", "at least 1"]),
        (("model", "--dtype", "int8"), ["--dtype 'int8'", "float32, bfloat16, autocast"]),
        (("model", "--layout", "nhwc"), ["--layout 'nhwc'", "channels_last"]),
        (("model", "--json", "/nowhere/at/all.json"), ["--json /nowhere/at/all.json", "folder does not exist"]),
        (("model", "--plot", "/nowhere/at/all.png"), ["--plot /nowhere/at/all.png", "folder does not exist"]),
        (("op", "--dtype", "autocast"), ["--dtype 'autocast'"]),
        (("op", "--shape", "8x3136"), ["'8x3136'", "BATCHxTOKENSxCHANNELS"]),
        (("op", "--shape", "0x1x1"), ["'0x1x1'"]),
        (("op", "--rounds", "-3"), ["--rounds -3"]),
        (("op", "--rounds", "few"), ["--rounds", "'few'"]),
        (("op", "--round", "3"), ["unrecognized arguments: --round"]),
        (("model", "--batch", "3"), ["unrecognized arguments: --batch"]),
        (("networks",), ["'networks'", "'op', 'model'"]),
        ((), ["what"]),
        (("op", "--accuracy", "--path", "cuda"), ["--path 'cuda'", "avx512"]),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(refused, words, names):
    refused("bench", *words, names=names)
