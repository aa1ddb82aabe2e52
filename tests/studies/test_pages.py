# SPDX-License-Identifier: Apache-2.0
"""Pages are written from results.json alone, and their verdicts follow from the runs."""

import json
import math
import shlex
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from little import LITTLE
from matplotlib.figure import Figure

from sola_vision.analysis.paper import ROWS
from sola_vision.engine import write_json
from sola_vision.studies import STUDIES, plan, write_report
from sola_vision.studies.fig1a import ACCURACY, MASK_AP, write_fig1a
from sola_vision.studies.figures import _draw_depths
from sola_vision.studies.outcome import RESULTS, gather, write_plan
from sola_vision.studies.scales import MEDIUM, SMALL


def invent(folder, name, data, values):
    """A study whose runs were never trained: `values` are accuracies by arm, a list over seeds."""
    study = STUDIES[name]
    seeds = max(map(len, values.values()))
    made = plan(study, LITTLE if study.network == "isotropic" else _four_stages(), data, seeds=seeds)
    write_plan(folder, made.description)
    (folder / "results").mkdir(parents=True)
    for run in made.runs:
        if run.seed < len(values[run.arm]):
            result = {
                **{"key": run.key, "seed": run.seed, "top1": values[run.arm][run.seed], "images_per_second": 10.0},
                **{"seconds": 3600.0, "hardware": "an abacus", "commit": "abc", "command": "sola study", "threads": 1},
            }
            write_json(folder / "results" / f"{run.key}.json", result)


def _four_stages():
    network = SMALL.hierarchical.with_changes(dims=(8, 8, 16, 16), img_size=8, head_dim=8)
    return replace(SMALL, hierarchical=network, train=LITTLE.train, limit=36)


TABLE_6 = {
    "Alternating": [50.0, 51.0, 49.0],
    "Stacked-Last": [52.0, 53.1, 51.0],
    "SoLA": [54.0, 55.0, 53.1],
    "SoLA + bridges": [53.0, 56.5, 52.0],
}


def test_a_folder_of_images_may_have_a_name_in_any_script(data, tmp_path):
    named = tmp_path / "猫"
    shutil.copytree(data, named)
    invent(tmp_path / "out", "table6", str(named), TABLE_6)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Glyph")  # of characters that the font of a figure lacks
        write_report(tmp_path / "out", "table6")
        write_fig1a(tmp_path / "out")


def test_verdicts_follow_from_the_numbers(data, tmp_path):
    invent(tmp_path, "table6", data, TABLE_6)
    outcome = write_report(tmp_path, "table6")
    by_text = {judged.claim.text: judged for judged in outcome.judged}
    assert by_text["SoLA > Alternating"].ours.verdict == "holds"
    assert by_text["SoLA > Alternating"].ours.mean == pytest.approx(4.0333, abs=1e-3)
    assert by_text["bridges > none"].ours.verdict == "undecided"
    assert by_text["bridges > none"].paper == pytest.approx(0.15)
    page = (tmp_path / "table6" / "report.md").read_text()
    assert "- bridges > none: **not decided by 3 seeds" in page
    assert "| Alternating | `LL/LL/LSLSLS/LS` | 79.12 | 50.00 ± 0.58 (3) |" in page


def test_the_speed_of_an_arm_is_the_median_of_its_runs(data, tmp_path):
    invent(tmp_path, "table6", data, {name: values[:2] for name, values in TABLE_6.items()})
    for seed, speed in ((0, 10.0), (1, 30.0)):
        for path in (tmp_path / "results").iterdir():
            result = json.loads(path.read_text())
            if result["seed"] == seed:
                write_json(path, {**result, "images_per_second": speed})
    assert [row.images_per_second for row in gather(tmp_path, "table6").rows] == [20.0] * 4


def test_the_reverse_is_called_so(data, tmp_path):
    invent(tmp_path, "table6", data, {**TABLE_6, "SoLA": [48.0, 49.1, 47.0]})
    page = write_report(tmp_path, "table6") and (tmp_path / "table6" / "report.md").read_text()
    assert "SoLA > Alternating: **does not hold here, the reverse does" in page


def test_equal_differences_decide_nothing_and_the_page_says_why(data, tmp_path):
    invent(tmp_path, "table6", data, {**TABLE_6, "SoLA": [value + 3 for value in TABLE_6["Alternating"]]})
    page = write_report(tmp_path, "table6") and (tmp_path / "table6" / "report.md").read_text()
    assert "SoLA > Alternating: **not decided: +3.00 in each of 3 seeds" in page


def test_one_seed_decides_nothing_and_an_unfinished_study_says_so(data, tmp_path):
    invent(tmp_path, "table6", data, {**{name: values[:1] for name, values in TABLE_6.items()}, "Alternating": [9, 9]})
    page = write_report(tmp_path, "table6") and (tmp_path / "table6" / "report.md").read_text()
    assert "Unfinished: 5 of 8 runs" in page
    assert "SoLA > Alternating: **not decided: one seed, +45.00**" in page
    assert (
        " holds" not in page.split("## Does the order hold here?")[1].split("## Every run")[0].split("Differences")[0]
    )


def test_a_run_without_a_number_counts_nowhere_and_the_page_says_so(data, tmp_path):
    nan = math.nan
    invent(tmp_path, "table6", data, {**TABLE_6, "SoLA": [54.0, nan, 53.1], "Stacked-Last": [nan] * 3})
    outcome = write_report(tmp_path, "table6")
    by_text = {judged.claim.text: judged.ours for judged in outcome.judged}
    assert (by_text["SoLA > Alternating"].n, by_text["SoLA > Stacked-Last"]) == (2, None)
    assert (outcome.missing, outcome.without_number) == (0, 4)
    page = (tmp_path / "table6" / "report.md").read_text()
    assert "**Excluded: 4 finished runs without top-1 accuracy.**" in page
    assert "| 53.55 ± 0.45 (2) |" in page
    files = [tmp_path / "table6" / RESULTS, *(tmp_path / "results").iterdir()]
    assert "nan" not in (page + "".join(file.read_text() for file in files)).lower()
    # as stored by earlier versions
    for file in files:
        file.write_text(file.read_text().replace('"top1": null', '"top1": NaN'))
    assert write_report(tmp_path, "table6").rows == outcome.rows


def test_pages_are_the_same_from_results_json_alone(data, tmp_path):
    invent(tmp_path, "table6", data, TABLE_6)
    write_report(tmp_path, "table6")
    page = (tmp_path / "table6" / "report.html").read_bytes()
    alone = tmp_path / "elsewhere"
    alone.mkdir()
    (alone / "table6").mkdir()
    shutil.copy(tmp_path / "table6" / RESULTS, alone / "table6")
    write_report(alone, "table6")
    assert (alone / "table6" / "report.html").read_bytes() == page


def test_the_page_has_all_that_a_reader_needs_to_run_it_again(finished):
    write_report(finished, "custom")
    page = (finished / "custom" / "report.md").read_text()
    for text in ("Hardware: ", "Commit of this project: ", "torch 2", "2 seeds per arm", "fingerprint", "sign-flip"):
        assert text in page
    assert "In the paper" not in page  # which has no study of these schedules
    html = (finished / "custom" / "report.html").read_text()
    assert "data:image/png;base64," in html
    assert html.count("<table>") == 3
    raw = json.loads((finished / "custom" / RESULTS).read_text())
    assert {run["seed"] for run in raw["results"]} == {0, 1}


def test_the_papers_scale_has_the_papers_costs_next_to_the_counted_ones(data, tmp_path):
    arms = [arm.name for arm in STUDIES["table1"].arms]
    invent(tmp_path, "table1", data, {name: [50.0, 51.0] for name in arms})
    write_report(tmp_path, "table1")
    page = tmp_path / "table1" / "report.md"
    assert "paper: GMACs" not in page.read_text()  # costs of other networks on other images
    stored = tmp_path / "table1" / RESULTS
    stored.write_text(stored.read_text().replace('"scale": "little"', '"scale": "paper"'))
    write_report(tmp_path, "table1")
    assert "| parameters | MMACs | paper: M parameters | paper: GMACs | images/s |" in page.read_text()
    (row,) = [line for line in page.read_text().splitlines() if line.startswith("| SLLLLL | `SLLLLL` | 83.70 | 50.50")]
    assert row.endswith("| 3.2 | 3.4 | 10 |")


def test_the_costs_of_the_paper_are_those_of_its_tables():
    for name, table in (("table1", "1"), ("table8", "8")):
        printed = {row.model if table == "1" else row.method: row for row in ROWS if row.table == table}
        for arm in STUDIES[name].arms:
            row = printed[arm.schedule if table == "1" else f"SoLA-{arm.size[0].upper()} + bridges"]
            assert (arm.paper_gmacs, arm.paper_params) == (row.gmacs, row.params)


@pytest.mark.parametrize("name", STUDIES)
def test_only_studies_of_the_paper_name_its_images(name):
    ours = any("Not in the paper" in note for note in STUDIES[name].notes)
    assert (STUDIES[name].data == "") == ours == all(arm.paper is None for arm in STUDIES[name].arms)


def test_a_study_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the study into this folder first"):
        gather(tmp_path, "table2")


def test_figure_1a_has_every_accuracy_once(tmp_path):
    names = {(row.table, row.method) for row in ROWS}
    assert all((table, method) in names for table, methods in ACCURACY.items() for method in methods)
    assert {(row.table, row.method) for row in ROWS if row.table in ACCURACY} == {
        (table, method) for table, methods in ACCURACY.items() for method in methods
    }
    assert MASK_AP.keys() == ACCURACY["4"].keys()
    write_fig1a(tmp_path)
    page = (tmp_path / "fig1a" / "report.md").read_text()
    assert "No study has been run" in page
    assert "| Table 4 | SoLA-B | 403 | 47.5 | 42.3 |" in page


def test_panels_of_figure_1a_have_few_ticks_in_mmacs(tmp_path, monkeypatch):
    shutil.copytree(STORED[0].parents[1] / "table2", tmp_path / "table2")
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *rest, **more: drawn.append(figure))
    monkeypatch.setattr("sola_vision.studies.fig1a.write_page", lambda *rest: None)
    write_fig1a(tmp_path)
    axes = drawn[0].axes[3]
    assert axes.get_xlabel() == "MMACs at 32 pixels"
    low, high = axes.get_xlim()
    assert len([tick for tick in axes.get_xticks() if low <= tick <= high]) <= 6


STORED = sorted((Path(__file__).parents[2] / "docs" / "studies").glob("*/results.json"))


@pytest.mark.parametrize("path", STORED, ids=[path.parent.name for path in STORED])
def test_a_stored_study_is_complete_and_names_no_folder(path, tmp_path):
    name = path.parent.name
    shutil.copytree(path.parent, tmp_path / name)
    outcome = gather(tmp_path, name)
    assert (outcome.missing, outcome.without_number) == (0, 0)
    for command in {result["command"] for result in outcome.results}:
        assert not any(Path(word).is_absolute() for word in shlex.split(command))


def test_the_tables_of_classification_are_stored():
    assert {"table1", "fig5", "table2", "table6", "table9"} <= {path.parent.name for path in STORED}


def test_a_study_over_depth_draws_the_number_of_layers(data, tmp_path):
    arms = [arm.name for arm in STUDIES["fig5"].arms]
    invent(tmp_path, "fig5", data, {name: [50.0 + len(name), 51.0 + len(name)] for name in arms})
    write_report(tmp_path, "fig5")
    assert "![accuracy against depth and cost](accuracy.png)" in (tmp_path / "fig5" / "report.md").read_text()
    axes = Figure().subplots()
    _draw_depths(gather(tmp_path, "fig5").rows, axes)
    assert axes.get_xlabel() == "K, layers"
    assert [
        line.get_xdata().tolist() for line in axes.lines if len(line.get_xdata()) and line.get_linestyle() == "-"
    ] == [[1, 2, 3, 4, 5, 6]] * 2


@pytest.mark.parametrize("scale", [SMALL, MEDIUM])
def test_a_scale_names_the_widths_of_its_networks(scale):
    """Not their parameters, which differ from arm to arm; the table of a page counts those."""
    *most, last = scale.hierarchical.dims
    (stack,) = scale.isotropic.dims
    assert f"{', '.join(map(str, most))} and {last} channels, or stacks of {stack} channels" in scale.what
    for text in (scale.what, scale.segmentation.what):
        assert "parameters" not in text


def test_the_papers_own_differences():
    table2 = STUDIES["table2"]
    differences = {claim.text: table2.paper_difference(claim) for claim in table2.claims}
    assert differences["equal budget: LLSLLS > SSLLLL"] == pytest.approx(0.47)
    assert differences["softmax late > early, one to three layers"] == pytest.approx(0.1233, abs=1e-3)
    assert STUDIES["fig5"].paper_difference(STUDIES["fig5"].claims[0]) is None
