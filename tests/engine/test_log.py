# SPDX-License-Identifier: Apache-2.0
"""Result files: JSON that every parser accepts, replaced atomically."""

import json
import math
import os
from types import SimpleNamespace

import pytest

from sola_vision.engine import write_json
from sola_vision.engine.log import json_text, metric_texts


def test_a_metric_of_nothing_is_null_in_json():
    document = {"miou": math.nan, "best": {"miou": math.inf, "step": 3}, "words": ["a"]}
    assert json.loads(json_text(document)) == {"miou": None, "best": {"miou": None, "step": 3}, "words": ["a"]}
    assert json.loads(json_text([{"by_seed": [(0, math.nan), (1, 2.5)]}])) == [{"by_seed": [[0, None], [1, 2.5]]}]


def test_a_file_that_cannot_be_replaced_stays_and_nothing_lies_beside(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"miou": math.nan})

    def fail(beside, path):
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        write_json(tmp_path / "a.json", [1])
    assert json.loads((tmp_path / "a.json").read_text()) == {"miou": None}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_writers_of_one_file_do_not_meet(tmp_path, monkeypatch):
    """On several machines, or in containers, processes may have the same id."""
    replace = os.replace

    def interrupted(beside, path):
        monkeypatch.setattr(os, "replace", replace)
        write_json(path, ["the other"])
        replace(beside, path)

    monkeypatch.setattr(os, "replace", interrupted)
    write_json(tmp_path / "a.json", ["this one"])
    assert json.loads((tmp_path / "a.json").read_text()) == ["this one"]


def test_a_metric_is_printed_with_its_unit():
    numbers = {"box_ap": 0.1149, "images": 7.0}
    task = SimpleNamespace(printed={"box_ap": "%", "mask_ap": "%"})
    assert metric_texts(task, numbers, ".2f") == {"box_ap": "box_ap 0.11 %"}
    assert metric_texts(SimpleNamespace(), numbers, ".4g") == {"box_ap": "box_ap 0.1149", "images": "images 7"}
