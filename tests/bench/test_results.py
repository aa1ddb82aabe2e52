# SPDX-License-Identifier: Apache-2.0
"""The list of measures and the tables of the pages come from the stored results and from nothing else."""

import argparse
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def scripts(monkeypatch):
    """benchmarks/measures.py and benchmarks/report.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import measures
    import report

    return measures, report


def ratio(model, baseline, images, macs, dtype="float32", compiled=False, layout="contiguous"):
    return {
        "model": model,
        "baseline": baseline,
        "dtype": dtype,
        "compiled": compiled,
        "layout": layout,
        "images_per_second": images,
        "gmacs_per_second": macs,
    }


def test_a_folder_for_results_is_created_or_refused_before_anything_is_measured(scripts, tmp_path, capsys):
    measures, _ = scripts
    parser = argparse.ArgumentParser()
    measures.add_out(parser)
    assert parser.parse_args(["--out", str(tmp_path / "a" / "b")]).out.is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="2"):
        parser.parse_args(["--out", str(tmp_path / "file")])
    assert "file cannot be a folder: File exists; use another path" in capsys.readouterr().err


def test_without_results_nothing_is_met(scripts):
    measures, report = scripts
    listed = measures.measures({})
    assert len(listed) > 20
    assert all(m.value is None and m.met is None and m.shown == "-" for m in listed)
    assert "Not measured yet" in report.TABLES["operator"]({})


def test_measures_take_the_right_rows(scripts):
    measures, _ = scripts
    deit = measures.DEIT_TINY
    rows = [
        ratio("sola_tiny", deit, 9.0, 9.0, compiled=True),
        ratio("sola_tiny", deit, 0.5, 0.91),
        ratio("sola_small", measures.SWIN, 1.6, 0.1, layout="fastest"),
        ratio("sola_small", measures.SWIN, 1.4, 0.1),
    ]
    growth = [
        {"model": "sola_tiny", "height": side, "seconds": seconds, "gmacs": gmacs, "peak_mib": 2900.0}
        for side, seconds, gmacs in ((512, 1.0, 10.0), (1024, 5.0, 50.0), (2048, 70.0, 350.0))
    ]
    training = {
        "ratios": [ratio("sola_tiny", deit, 0.4, 0.89)],
        "rows": [{"model": "sola_tiny", "added_mib": 1000.0}, {"model": deit, "added_mib": 500.0}],
    }
    results = {"network_224_f32": {"ratios": rows}, "growth": {"rows": growth}, "training": training}
    found = {m.what: (m.value, m.met) for m in measures.measures(results)}
    assert found["224 float32: multiply-add rate, sola_tiny over deit_tiny"] == (0.91, True)
    assert found["224 float32: images/s, sola_small over swin_tiny"] == (1.4, False)
    assert found["224 float32: images/s, sola_small over swin_tiny, each in its faster layout"] == (1.6, True)
    assert found["224 bfloat16: multiply-add rate, sola_tiny over deit_tiny"] == (None, None)
    assert found["growth: time over MACs, sola_tiny, 512 to 1024"] == (1.0, True)
    assert found["growth: time over MACs, sola_tiny, 1024 to 2048"] == (2.0, False)
    # mebibytes are more than megabytes
    assert found["growth: peak memory of the process, sola_tiny, 2048"] == (pytest.approx(3.041, abs=1e-3), False)
    assert found["training step: multiply-add rate, sola_tiny over deit_tiny"] == (0.89, False)
    assert found["training step: memory, sola_tiny over deit_tiny"] == (2.0, True)


def test_the_pages_hold_what_the_files_say(scripts):
    measures, report = scripts
    names = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("performance*.md")))]
    pages = {name: (ROOT / name).read_text() for name in names}
    together = "".join(pages.values())
    for name in report.TABLES:
        assert together.count(f"<!-- table: {name} -->") == 1, name
    for name, page in pages.items():
        assert page == report.filled(page, measures.load()), f"run python benchmarks/report.py --write {name}"


def test_every_part_is_a_command_that_exists(scripts):
    import shlex

    import cpu

    from sola_vision.commands import bench

    _, report = scripts
    for results in cpu.PARTS.values():
        for command in results.values():
            bench._check(bench._parse(shlex.split(command)))
    parts = {name: part for part, results in cpu.PARTS.items() for name in results}
    assert report._PARTS.items() <= parts.items()


def test_a_table_is_replaced_and_the_rest_stays(scripts):
    _, report = scripts
    page = "a\n<!-- table: growth -->\nold\n<!-- end -->\nb\n"
    filled = report.filled(page, {})
    assert "old" not in filled
    assert filled.startswith("a\n<!-- table: growth -->\n\n*Not measured yet:*")
    assert filled.endswith("\n<!-- end -->\nb\n")
    assert report.filled(filled, {}) == filled
    with pytest.raises(ValueError, match="unknown table 'grwth'"):
        report.filled(page.replace("growth", "grwth"), {})
