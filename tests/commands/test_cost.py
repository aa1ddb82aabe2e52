# SPDX-License-Identifier: Apache-2.0
"""`sola cost` from the outside: output and files, one line and exit code 2 for invalid input."""

import csv
import json

import pytest
from matplotlib.figure import Figure
from PIL import Image

from sola_vision.analysis.paper import PaperRow, compare_with_paper
from sola_vision.cli import main
from sola_vision.commands import cost as command
from sola_vision.data import ImageConfig
from sola_vision.engine import save_weights
from sola_vision.tasks import ModelConfig, build_model, load, metadata


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


def write_checkpoint(path, task="classification", **changes):
    """A network with the bridges, classes and image size of a run; `changes` replaces entries of its metadata."""
    config = ModelConfig(name="sola_nano", dims=(8, 16, 32, 32), bridges="1.2>3.3")
    model = build_model(config, 3, 48)
    save_weights(path, model, metadata(task, config, ImageConfig(size=48), ["ant", "bee", "cat"], model) | changes)


def test_a_run_is_counted_with_its_bridges_classes_and_image_size(trained, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    write_checkpoint(tmp_path / "run" / "best.safetensors")
    both = [str(trained), str(tmp_path / "run" / "best.safetensors")]
    costs = run_json(capsys, *both, "sola_nano", "--compare", both[1])
    assert [(c["model"], c["height"], c["width"]) for c in costs] == [
        (model, size, size) for model in (*both, "sola_nano", both[1]) for size in (32, 48)
    ]
    for cost in costs:
        if cost["model"] in both:
            assert cost["parameters"] == sum(p.numel() for p in load(cost["model"]).parameters())
    assert {"bridge 1.2>3.3"} < {layer["name"] for layer in costs[2]["layers"]}
    (backbone,) = run_json(capsys, both[1], "--classes", "0", "--size", "64")
    assert backbone["parameters"] == costs[2]["parameters"] - 3 * (32 + 1)
    assert main(["cost", both[1]]) == 0
    assert " run/best.safetensors " in capsys.readouterr().out
    assert main(["cost", both[1], "--by", "stage"]) == 0
    assert "run/best.safetensors at 48x48" in capsys.readouterr().out


def test_a_run_of_a_network_for_one_size_is_counted_at_any_size(tmp_path, capsys):
    config = ModelConfig(name="deit_tiny_patch16_224")
    model = build_model(config, 3, 48)
    path = tmp_path / "sola_like" / "best.safetensors"
    path.parent.mkdir()
    save_weights(path, model, metadata("classification", config, ImageConfig(size=48), ["a", "b", "c"], model))
    costs = run_json(capsys, str(path.parent), "--size", "48", "96")
    assert [cost["height"] for cost in costs] == [48, 96]
    assert costs[0]["parameters"] == sum(p.numel() for p in model.parameters())


def test_checkpoints_that_are_not_of_classifiers_of_rgb_images_are_refused(tmp_path, refused):
    path = tmp_path / "best.safetensors"
    write_checkpoint(path, task="segmentation")
    refused("cost", tmp_path, names=[path, "is a checkpoint for segmentation", "use a classifier's", "sola_nano"])
    refused("bench", "model", path, names=[path, "is a checkpoint for segmentation"])
    write_checkpoint(path, model=json.dumps({"name": "sola_nano", "in_chans": 4}))
    refused("cost", path, names=["takes images of 4 channels", "RGB"])
    write_checkpoint(path, image=json.dumps({"side": 48}))
    refused("cost", path, names=["its metadata was not written by sola train"])
    write_checkpoint(path)
    refused("cost", path, "--schedule", "L/S", names=["--schedule needs the name of a network", path])
    refused("cost", tmp_path / "no.safetensors", names=["no.safetensors", "unknown", "the path of a run or checkpoint"])
    (tmp_path / "empty").mkdir()
    refused("cost", tmp_path / "empty", names=["holds none of best.safetensors"])


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


@pytest.mark.parametrize("sizes", [["64", "128", "224"], ["64x96", "128x96"]])
def test_ticks_of_the_plot_are_the_given_sizes(tmp_path, monkeypatch, sizes):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *rest, **more: drawn.append(figure))
    assert main(["cost", "sola_nano", "--size", *sizes, "--plot", str(tmp_path / "c.png")]) == 0
    for axes in drawn[0].axes:
        assert [label.get_text() for label in axes.get_xticklabels(which="both")] == sizes


def test_a_schedule_is_that_of_the_named_network_only(tmp_path, capsys):
    table = tmp_path / "c.csv"
    words = [
        "sola_nano",
        "--size",
        "32",
        "--schedule",
        "LL/LL/SSSSSS/SS",
        "--compare",
        "sola_nano",
        "--csv",
        str(table),
    ]
    assert main(["cost", *words, "--json"]) == 0
    changed, default = json.loads(capsys.readouterr().out)
    assert (changed["model"], changed["schedule"]) == ("sola_nano", "LL/LL/SSSSSS/SS")
    assert default["model"] == "sola_nano"
    assert "schedule" not in default
    names = {row["model"] for row in csv.DictReader(table.open())}
    assert names == {"sola_nano", "sola_nano LL/LL/SSSSSS/SS"}
    assert main(["cost", *words]) == 0
    assert "sola_nano LL/LL/SSSSSS/SS" in capsys.readouterr().out


def test_sizes_of_equal_area_share_a_tick(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *rest, **more: drawn.append(figure))
    assert main(["cost", "sola_nano", "--size", "32", "32x128", "64x64", "--plot", str(tmp_path / "c.png")]) == 0
    labels = [label.get_text() for label in drawn[0].axes[0].get_xticklabels(which="both")]
    assert labels == ["32x32", "32x128\n64x64"]


def test_paper_tables(capsys):
    assert main(["cost", "--paper", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 62
    sola_t = next(r for r in rows if r["table"] == "7" and r["method"] == "SoLA-T")
    assert (sola_t["paper_gmacs"], round(sola_t["gmacs"], 3)) == (1.89, 1.943)
    assert round(sola_t["gmacs_difference_percent"], 1) == 2.8


def test_paper_tables_say_what_a_dash_means(capsys, monkeypatch):
    rows = [PaperRow("3", "PVT-T", (224, 224), 1.9, 13.2), PaperRow("4", "VRWKV-T", (1333, 800), 67.9, 8.4)]
    monkeypatch.setattr(command, "compare_with_paper", lambda: compare_with_paper(rows))
    assert main(["cost", "--paper"]) == 0
    *_, heads, dashes = capsys.readouterr().out.splitlines()
    assert heads.endswith("SoLA is counted without its head, the other networks with it.")
    # Vision-RWKV is in this package, but Table 4 has it with an adapter
    assert "neither timm nor this package has the network (in Tables 4 and 5 ViT and VRWKV include" in dashes


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
        (["--paper", "--size", "7"], "--paper counts the paper's networks at the paper's sizes: leave out --size"),
        (["sola_nano", "--figure-1b"], "leave out the networks"),
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
