# SPDX-License-Identifier: Apache-2.0
"""Runs are executed once, shared between studies and processes, and give the same result after any number of kills."""

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import little
import pytest
from little import LITTLE, planned, run

from sola_vision.studies import STUDIES, custom, plan
from sola_vision.studies.claims import claimed
from sola_vision.studies.outcome import gather
from sola_vision.studies.runner import _published
from sola_vision.studies.scales import SCALES

SAME = ("key", "seed", "top1", "top5", "loss", "network", "train", "data", "steps")


def results(folder):
    return {path.name: json.loads(path.read_text()) for path in sorted((Path(folder) / "results").iterdir())}


def same(one, other):
    assert one.keys() == other.keys()
    for name, result in one.items():
        assert {k: result[k] for k in SAME} == {k: other[name][k] for k in SAME}


def start(data, out, *step):
    words = [sys.executable, little.__file__, data, str(out), *map(str, step)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_study_runs_every_arm_with_every_seed(finished):
    outcome = gather(finished, "custom")
    assert outcome.missing == 0
    assert [row.name for row in outcome.rows] == ["L/LL", "L/LS"]
    assert all(set(row.by_seed) == {0, 1} for row in outcome.rows)
    assert all(result["train"]["seed"] == result["seed"] for result in outcome.results)


def test_results_tell_no_folders_of_the_machine(finished, data):
    for result in results(finished).values():
        assert str(finished) not in json.dumps(result)
        assert data not in json.dumps(result)
        assert not any(word.startswith("/") for word in result["command"].split())


def test_the_command_can_be_typed_again():
    given = ["study", "custom", "--data", "/somewhere/images", "--out=/somewhere/new", "--epochs=2"]
    given += ["--schedules", "LL/LL/LLLSSS/LS 1.2>3.4", "L/L/L/S"]
    command = _published(f"python -m sola_vision {shlex.join(given)}")
    assert shlex.split(command)[3:] == [word.replace("/somewhere/", "") for word in given]
    assert "'LL/LL/LLLSSS/LS 1.2>3.4'" in command


def test_killed_studies_go_on_and_end_with_the_same_results(finished, data, tmp_path):
    # in the first run before any checkpoint, and within the second run
    for step in (1, 12):
        process = start(data, tmp_path, step)
        process.communicate()
        assert process.returncode == -9
    assert start(data, tmp_path).communicate()[0].count("seed") <= 3
    same(results(tmp_path), results(finished))
    one, other = gather(tmp_path, "custom"), gather(finished, "custom")
    assert one.judged == other.judged


@pytest.mark.slow  # two processes that import torch; test_claims tests the exclusion alone
def test_two_processes_share_the_work(finished, data, tmp_path):
    both = [start(data, tmp_path) for _ in range(2)]
    done = [process.communicate()[0].splitlines() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum(map(len, done)) == 4  # every run was executed by exactly one of them
    same(results(tmp_path), results(finished))


def test_finished_runs_are_not_done_again_and_more_seeds_extend(finished, data, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    said = []
    assert run(planned(data), tmp_path / "copy", said.append) == 0
    assert said == []
    run(planned(data, seeds=3), tmp_path / "copy", said.append)
    assert len(said) == 2
    assert all(set(row.by_seed) == {0, 1, 2} for row in gather(tmp_path / "copy", "custom").rows)


def test_a_run_that_another_process_does_is_left_to_it(data, tmp_path):
    few = planned(data, seeds=1)
    with claimed(tmp_path / "runs" / few.runs[0].key) as mine:
        assert mine
        assert run(few, tmp_path) == 1
    assert gather(tmp_path, "custom").missing == 1
    assert run(few, tmp_path) == 0
    assert gather(tmp_path, "custom").missing == 0


def test_studies_with_the_same_run_share_it(data):
    fig5, table1 = (plan(STUDIES[name], LITTLE, data) for name in ("fig5", "table1"))
    shared = {run.key for run in fig5.runs} & {run.key for run in table1.runs}
    assert len(shared) == 2 * LITTLE.seeds  # LLLLLL and LLLLLS
    # SSSSSS has the same feed-forward networks in both variants
    assert len({run.key for run in table1.runs}) == len(table1.runs) - LITTLE.seeds


@pytest.mark.parametrize(
    "changes", [{"epochs": 3}, {"limit": 30}, {"schedules": ("L/LL", "L/SS")}], ids=["epochs", "limit", "schedules"]
)
def test_what_changes_a_result_changes_the_key(data, changes):
    before, after = ({run.key for run in planned(data, **some).runs} for some in ({}, changes))
    assert not before <= after


def test_what_does_not_change_a_result_keeps_the_key(data, tmp_path):
    shutil.copytree(data, tmp_path / "moved")
    other = replace(LITTLE, train=replace(LITTLE.train, workers=2, save_seconds=1.0, log_every=7))
    keys = [run.key for run in planned(data).runs]
    assert [run.key for run in planned(str(tmp_path / "moved"), scale=other).runs] == keys


def test_a_folder_keeps_the_settings_it_was_begun_with(finished, data):
    with pytest.raises(ValueError, match="contains custom with another epochs"):
        run(planned(data, epochs=1), finished)


@pytest.mark.parametrize("name", [name for name, study in STUDIES.items() if study.task == "classification"])
def test_every_study_fits_every_scale(name, data):
    for scale in SCALES.values():
        small = replace(scale, train=replace(scale.train, batch_size=8))
        made = plan(STUDIES[name], small, data, seeds=1)
        # Table 1 names SSSSSS twice, in two variants of which it is the same network
        assert len({run.key for run in made.runs}) == len(STUDIES[name].arms) - (name == "table1")
        for each in made.runs:
            each.build("meta")


def test_the_papers_scale_costs_what_table_1_says(data):
    scale = replace(SCALES["paper"], train=replace(SCALES["paper"].train, batch_size=8))
    arms = plan(STUDIES["table1"], scale, data, seeds=1).description["arms"]
    for arm in STUDIES["table1"].arms[:5]:
        assert arms[arm.name]["macs"] / 1e9 == pytest.approx(arm.paper_gmacs, abs=0.1)


def test_too_few_images_for_the_classes(data):
    with pytest.raises(ValueError, match="12 training images for 3 classes, too few"):
        planned(data, limit=12)


def test_schedules_with_bridges_are_arms_of_their_own():
    bare, bridged = custom(["L/LS", "L/LS 1.1>2.2"]).arms
    assert (bare.schedule, bare.bridges) == ("L/LS", "")
    assert (bridged.name, bridged.schedule, bridged.bridges) == ("L/LS 1.1>2.2", "L/LS", "1.1>2.2")


def test_schedules_that_do_not_fit(data):
    with pytest.raises(ValueError, match="give schedules of equal depths"):
        custom(["L/LL", "L/LLL"])
    with pytest.raises(ValueError, match="duplicate schedule"):
        custom(["L/LL", "L/LL"])
    with pytest.raises(ValueError, match="two or more"):
        custom(["L/LL"])
    with pytest.raises(ValueError, match="a bridge must end at a softmax layer"):
        custom(["L/LS", "L/LS 1.1>2.1"])
    with pytest.raises(ValueError, match="has 3 stages but the scale's network has 2"):
        planned(data, schedules=("L/L/L", "L/L/S"))


def test_a_file_of_names_chooses_classes(data, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("bee\nant\n")
    chosen = planned(data, class_file=str(names)).images
    assert chosen.classes == ["ant", "bee"]
    assert (chosen.identity.train, chosen.identity.val) == (28, 10)
    assert [chosen.train[i][1] for i in (0, 27)] == [0, 1]
    names.write_text("ant\nelk\n")
    with pytest.raises(ValueError, match="'elk' is not among the 3 classes"):
        planned(data, class_file=str(names))
