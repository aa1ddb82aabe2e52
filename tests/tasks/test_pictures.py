# SPDX-License-Identifier: Apache-2.0
"""The learning curve of runs that are short or whose records are damaged."""

import json

import pytest
from matplotlib.figure import Figure

from sola_vision.tasks.pictures import draw_learning_curve


def write(path, train, evaluated=1):
    losses = [{"kind": "train", "step": n, "epoch": n / 10, "loss": 2 / n} for n in range(1, train + 1)]
    scores = [{"kind": "eval", "step": n, "epoch": n / 10, "top1": 50.0} for n in range(1, evaluated + 1)]
    path.write_text("".join(json.dumps(record) + "\n" for record in losses + scores))
    return path


@pytest.fixture
def axes(tmp_path, monkeypatch):
    """Draw a file's curve and return the axes of the loss and, if present, of the metric."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k)))

    def draw(metrics):
        draw_learning_curve(metrics, tmp_path / "curve.png", "top1")
        return figures[-1].axes

    return draw


@pytest.mark.parametrize(("points", "marked"), [(1, True), (5, True), (200, False)])
def test_few_points_are_marked(axes, tmp_path, points, marked):
    line = axes(write(tmp_path / "metrics.jsonl", points))[0].lines[0]
    assert len(line.get_xdata()) == points
    assert (line.get_marker() == "o") == marked


def test_epochs_are_shown_from_the_beginning(axes, tmp_path):
    for train, evaluated, last in ((1, 1, 0.1), (20, 0, 2.0), (3, 30, 3.0)):
        left, right = axes(write(tmp_path / "metrics.jsonl", train, evaluated))[0].get_xlim()
        assert left == 0
        assert last < right < 1.1 * last
    (tmp_path / "metrics.jsonl").write_text("")
    assert axes(tmp_path / "metrics.jsonl")[0].get_xlim() == (0, 1.03)


@pytest.mark.parametrize("damage", ["garbage", '{"kind": "train"', "[1]", "{}", "\udcff\udcfe"])
def test_a_damaged_line_is_skipped_with_a_warning(axes, tmp_path, caplog, damage):
    path = write(tmp_path / "metrics.jsonl", 5)
    lines = path.read_text().splitlines()
    lines[2] = damage
    path.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    left, right = axes(path)
    assert list(left.lines[0].get_xdata()) == [0.1, 0.2, 0.4, 0.5]
    assert len(right.lines[0].get_xdata()) == 1
    assert caplog.messages == [f"{path}: line 3 is not a record and is skipped"]
