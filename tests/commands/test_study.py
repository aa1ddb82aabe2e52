# SPDX-License-Identifier: Apache-2.0
"""`sola study` and `sola search` from the outside: output, and one line for invalid input."""

import json
import re
from dataclasses import replace

import pytest
import yaml

from sola_vision.studies.scales import SCALES


@pytest.fixture(autouse=True)
def _little(monkeypatch):
    """The small scale, smaller."""
    small = SCALES["small"]
    network = small.hierarchical.with_changes(dims=(8, 8, 16, 16), img_size=8, head_dim=8)
    stack = small.isotropic.with_changes(dims=(16,), img_size=8, head_dim=8)
    train = replace(small.train, batch_size=7, warmup_epochs=0.2)
    monkeypatch.setitem(
        SCALES, "small", replace(small, hierarchical=network, isotropic=stack, train=train, epochs={"hierarchical": 1})
    )


CUSTOM = ("study", "custom", "--schedules", "L/L/LL/L", "L/L/LS/L", "--seeds", "1", "--device", "cpu")


def test_a_custom_study_then_all_pages_again(sola, data, tmp_path, monkeypatch):
    said = sola(*CUSTOM, "--data", data, "--out", tmp_path / "s", "--json")
    assert said.code == 0, said.err
    (document,) = json.loads(said.out)
    assert document["missing"] == 0
    assert [row["name"] for row in document["rows"]] == ["L/L/LL/L", "L/L/LS/L"]
    # of torchrun's processes only the first reports
    monkeypatch.setenv("RANK", "1")
    said = sola(*CUSTOM, "--data", data, "--out", tmp_path / "s", "--json")
    monkeypatch.delenv("RANK")
    assert (said.code, said.out) == (0, "")
    page = tmp_path / "s" / "custom" / "report.md"
    before = page.read_text()
    page.unlink()
    said = sola("study", "all", "--report", "--out", tmp_path / "s")
    assert said.code == 0, said.err
    assert page.read_text() == before
    assert "top-1 accuracy in %, ± the standard error of several seeds (number of seeds)\n" in said.out
    assert (tmp_path / "s" / "fig1a" / "report.html").exists()


def test_weights_of_a_study_are_checkpoints_of_sola(sola, data, tmp_path):
    assert sola(*CUSTOM, "--data", data, "--out", tmp_path / "s").code == 0
    result = json.loads(next((tmp_path / "s" / "results").iterdir()).read_text())
    run = tmp_path / "s" / "runs" / result["key"]
    said = sola("eval", "--checkpoint", run, "--data", data, "--json", "--device", "cpu", "--out", tmp_path / "e")
    assert said.code == 0, said.err
    assert json.loads(said.out)["top1"] == pytest.approx(result["top1"], abs=1e-3)


def test_list_runs_nothing(sola, data, tmp_path):
    said = sola("study", "table2", "--data", data, "--out", tmp_path / "s", "--list")
    assert (said.code, said.out.count("seed")) == (0, 30)
    said = sola("study", "table2", "--data", data, "--out", tmp_path / "s", "--list", "--json")
    assert [run["finished"] for run in json.loads(said.out)] == [False] * 30
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("table3",), ["'table3' is unknown", "table2", "fig1a, custom and all"]),
        (("table2",), ["needs --data"]),
        (("fig1a", "--json"), ["leave out --json"]),
        (("table2", "--data", "nowhere"), ["nowhere: no such folder"]),
        (("table2", "--data", "DATA", "--limit", "9"), ["7 training images for 7 classes, too few: "]),
        (("table2", "--data", "DATA", "--seeds", "0"), ["--seeds 0"]),
        (("table2", "--data", "DATA", "--schedules", "L"), ["--schedules needs custom"]),
        (("table2", "--data", "DATA", "--scale", "huge"), ["--scale", "huge"]),
        (("table8",), ["needs --data", "annotations/SPLIT"]),
        (("table8", "--data", "DATA"), ["images/SPLIT and annotations/SPLIT"]),
        (("table8", "--data", "DATA", "--classes", "names.txt"), ["--classes", "leave it out"]),
        (("table2", "--data", "DATA", "--ignore", "0"), ["--ignore and --init need table8"]),
        (("all",), ["--report"]),
        (("table2", "--report"), ["run the study into this folder first"]),
        (
            ("custom", "--data", "DATA", "--schedules", "L/L/LL/L", "L/L/L/L"),
            ["1/1/1/1", "give schedules of equal depths"],
        ),
        (("custom", "--data", "DATA", "--schedules", "L/X", "L/L"), ["'X' is not a layer"]),
        (("custom", "--data", "DATA", "--schedules", "L/L", "L/S"), ["has 2 stages", "has 4"]),
        (
            ("custom", "--data", "DATA", "--schedules", "L/L/LL/L", "L/L/LL/L 1.1>3.2"),
            ["must end at a softmax layer"],
        ),
    ],
)
def test_a_study_refuses(refused, data, tmp_path, words, names):
    refused("study", *(str(data) if word == "DATA" else word for word in words), "--out", tmp_path / "s", names=names)


SEARCH = ("search", "--space", "L/L/???/L", "--limit", "42", "--device", "cpu")


@pytest.mark.parametrize("bridges", ["", "1.1>3.3"])
def test_a_search_prints_a_network_and_leaves_a_recipe_that_trains(sola, data, tmp_path, bridges):
    budget = f"L/L/LLS/L {bridges}".rstrip()
    words = (*SEARCH, "--budget", budget, "--size", "128", "--data", data, "--out", tmp_path / "s")
    words += ("--bridges",) if bridges else ()
    said = sola(*words)
    assert said.code == 0, said.err
    schedule = said.out.split()[0]
    assert (len(schedule), schedule.count("S")) == (9, 1)
    document = json.loads((tmp_path / "s" / "search.json").read_text())
    assert f"{document['schedule']} {document['bridges']}".rstrip() == said.out.strip()
    assert bool(document["bridges"]) <= bool(bridges)
    assert abs(document["off_budget_percent"]) <= 2
    assert (tmp_path / "s" / "curve.png").exists()
    recipe = tmp_path / "s" / "recipe.yaml"
    model = yaml.safe_load(recipe.read_text())["model"]
    assert (model["schedule"], model["bridges"]) == (schedule, document["bridges"])
    said = sola("train", "--config", recipe, "--out", tmp_path / "t", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["epochs"] == 1

    before = (tmp_path / "s" / "search.json").read_text()
    assert sola(*words).out.split()[0] == schedule
    assert (tmp_path / "s" / "search.json").read_text() == before


def test_a_measured_search_goes_on_with_what_it_measured(sola, data, tmp_path):
    words = (*SEARCH, "--budget", "1000000ms", "--method", "rule", "--data", data, "--out", tmp_path / "s")
    limits = re.search(r"they cost ([0-9.]+) ms .* to ([0-9.]+) ms", sola(*words).err)
    assert limits is not None
    assert not (tmp_path / "s" / "costs.json").exists()
    budget = f"{limits[2]}ms"
    (tmp_path / "s").mkdir()
    costs = {"base": float(limits[2]) / 1e3, "extra": [{"S": 0.0}] * 3, "unit": "seconds"}
    (tmp_path / "s" / "costs.json").write_text(json.dumps(costs))
    said = sola(*SEARCH, "--budget", budget, "--method", "rule", "--data", data, "--out", tmp_path / "s")
    assert said.code == 0, said.err
    assert json.loads((tmp_path / "s" / "costs.json").read_text()) == costs


def test_the_rule_needs_no_batch_of_images(sola, refused, data, tmp_path, monkeypatch):
    small = SCALES["small"]
    monkeypatch.setitem(SCALES, "small", replace(small, train=replace(small.train, batch_size=36)))
    words = (*SEARCH, "--budget", "L/L/LLS/L", "--data", data, "--out", tmp_path / "s")
    refused(*words, names=["35 training images, fewer than one batch of 36"])
    said = sola(*words, "--method", "rule")
    assert said.code == 0, said.err
    assert said.out == "L/L/LLS/L\n"
    assert "search.json and recipe.yaml are in" in said.err
    assert not (tmp_path / "s" / "curve.png").exists()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("--budget", ""), ["--budget ''", "empty"]),
        (("--budget", "1G"), ["no schedule of L/L/???/L meets it", "L/L/LLL/L"]),
        (("--budget", "0.01M"), ["no schedule of L/L/???/L meets it"]),
        (("--budget", "cheap"), ["'cheap'", "such as"]),
        (
            ("--budget", "L/L/LL/L"),
            ["--budget L/L/LL/L does not fit the space", "the length of its stage 3 is 2, not 3"],
        ),
        (("--budget", "L/L/LLL"), ["--budget L/L/LLL does not fit the space", "the number of its stages is 3, not 4"]),
        (("--budget", "L/S/LLL/L"), ["does not fit the space", "its stage 2 is S, not L"]),
        (("--budget", "1M", "--space", "L/???"), ["has 2 stages"]),
        (("--budget", "1M", "--space", "L/L/LL/L"), ["0 open layers"]),
        (("--budget", "1M", "--latency"), ["--latency"]),
        (("--budget", "L/L/LLS/L 1.1>3.3"), ["1.1>3.3", "--bridges"]),
        (("--budget", "L/L/LLS/L 1.1>3.2", "--bridges"), ["must end at a softmax layer"]),
        (("--budget", "L/L/LLS/L", "--size", "0x3"), ["--size"]),
        (("--budget", "L/L/LLS/L", "--limit", "7"), ["too few"]),
        # an invalid budget is reported before missing data
        (("--budget", "cheap", "--data", "nowhere"), ["'cheap'", "such as"]),
        (("--budget", "L/L/LL/L", "--data", "nowhere"), ["does not fit the space"]),
        ((), ["--budget"]),
    ],
)
def test_a_search_refuses(refused, data, tmp_path, words, names):
    refused(*SEARCH, "--data", data, "--out", tmp_path / "s", *words, names=names)
