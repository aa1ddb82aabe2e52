# SPDX-License-Identifier: Apache-2.0
"""`sola cost` from the outside: output and files, one line and exit code 2 for invalid input."""

import csv
import json

import pytest
from PIL import Image

from sola_vision.cli import main


def run_json(capsys, *arguments):
    assert main(["cost", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_sizes_schedules_and_networks_side_by_side(capsys):
    costs = run_json(capsys, "sola_nano", "--size", "64", "96x32", "--compare", "resnet18")
    assert [(c["model"], c["height"], c["width"]) for c in costs] == [
        ("sola_nano", 64, 64),
        ("sola_nano", 96, 32),
        ("resnet18", 64, 64),
        ("resnet18", 96, 32),
    ]
    (softmax,) = run_json(capsys, "sola_tiny", "--size", "64", "--schedule", "SS/SS/SSSSSS/SS", "--classes", "0")
    assert {g["name"] for g in softmax["operators"]} >= {"attention", "linear"}
    assert "wkv" not in {g["name"] for g in softmax["operators"]}
    assert softmax["schedule"] == "SS/SS/SSSSSS/SS"
    assert sum(g["macs"] for g in softmax["layers"]) == softmax["macs"]


def test_short_names_of_timm_are_completed(capsys):
    names = [c["model"] for c in run_json(capsys, "sola_nano", "--size", "224", "--compare", "deit_tiny", "swin_tiny")]
    assert names == ["sola_nano", "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224"]


def test_table_csv_and_picture(tmp_path, capsys):
    table, picture = tmp_path / "c.csv", tmp_path / "c.png"
    arguments = [
        "cost",
        "sola_nano",
        "--size",
        "32",
        "64",
        "--by",
        "layer",
        "--csv",
        str(table),
        "--plot",
        str(picture),
    ]
    assert main(arguments) == 0
    assert "3.3 S" in capsys.readouterr().out
    rows = list(csv.DictReader(table.open()))
    small = sum(int(row["macs"]) for row in rows if row["height"] == "32")
    assert small > 0
    assert small < sum(int(row["macs"]) for row in rows if row["height"] == "64")
    assert Image.open(picture).size[0] > 600


def test_paper_tables(capsys):
    assert main(["cost", "--paper", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 62
    sola_t = next(r for r in rows if r["table"] == "7" and r["method"] == "SoLA-T")
    assert (sola_t["paper_gmacs"], round(sola_t["gmacs"], 3)) == (1.89, 1.943)
    assert round(sola_t["gmacs_difference_percent"], 1) == 2.8


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sola_huge"], "network 'sola_huge' is unknown"),
        (["--size", "12x"], "--size '12x' must be HEIGHTxWIDTH"),
        (["--size", "0"], "must be HEIGHTxWIDTH"),
        (["--schedule", "LX"], "'X' is not a layer"),
        (["--schedule", "LL/LL"], "has 2 stages"),
        (["--batch", "0"], "sola: --batch 0 must be at least 1\n"),
        (["--classes", "-1"], "sola: --classes -1 must be at least 0\n"),
        (["--measure"], "--measure needs --figure-1b"),
        (["resnet18", "--schedule", "L"], "resnet18 has no schedule"),
        (["--size", "32", "--plot", "/nowhere/at/all.png"], "--plot /nowhere/at/all.png: its folder does not exist"),
        (["--size", "32", "--csv", "/nowhere/at/all.csv"], "--csv /nowhere/at/all.csv: its folder does not exist"),
        (["--sizes", "32"], "unrecognized arguments: --sizes"),
        (["--siz", "32"], "unrecognized arguments: --siz"),
        (["--classes", "ten"], "--classes: invalid int value: 'ten'"),
        (["--by", "head"], "--by: invalid choice: 'head'"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments, says, capsys):
    assert main(["cost", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sola: ")
    assert says in error
    assert error.count("\n") == 1
