# SPDX-License-Identifier: Apache-2.0
"""Schedules as tiles: pressing a tile changes its layer, and the cost is that of `sola cost`."""

import json

import pytest

from sola_vision.app.tiles import price, toggled
from sola_vision.cli import main


def test_a_press_changes_one_layer_and_back():
    assert toggled("LL/LL/LLSLLS/LS", 2, 0) == "LL/LL/SLSLLS/LS"
    assert toggled("LL/LL/LLSLLS/LS", 3, 1) == "LL/LL/LLSLLS/LL"
    for stage, layer in ((0, 0), (2, 5)):
        assert toggled(toggled("LL/LL/LLSLLS/LS", stage, layer), stage, layer) == "LL/LL/LLSLLS/LS"


def test_the_price_is_that_of_the_cost_command(capsys):
    priced = price("sola_tiny", "LL/LL/SLSLLS/LS", 256)
    assert main(["cost", "sola_tiny", "--schedule", "LL/LL/SLSLLS/LS", "--size", "256", "--json"]) == 0
    (cost,) = json.loads(capsys.readouterr().out)
    assert f"**{cost['macs'] / 1e9:.2f} GMACs**" in priced.summary
    layers = {group["name"].split()[0]: group["macs"] for group in cost["layers"] if group["name"][:1].isdigit()}
    shown = {f"{t.stage + 1}.{t.layer + 1}": round(t.gmacs * 1e9) for tiles in priced.stages for t in tiles}
    assert shown.items() <= layers.items()
    assert len(shown) == 12
    assert priced.stages[2][0].text == f"S  {layers['3.1'] / 1e9:.3f}"


def test_an_unexpected_error_is_a_message_on_the_page(monkeypatch):
    gradio = pytest.importorskip("gradio")
    from sola_vision.app import page

    def fail(*values):
        raise OSError("the disk\nis gone")

    monkeypatch.setattr(page, "price", fail)
    (drawn,) = page.build([]).renderables
    with pytest.raises(gradio.Error, match="the disk is gone"):
        drawn.fn("sola_tiny", "LL/LL/LLSLLS/LS", 224)


def test_early_softmax_costs_more_and_the_default_schedule_is_the_baseline():
    own = price("sola_tiny", "LL/LL/LLSLLS/LS", 512)
    assert own.summary.count("(+0 %)") == 4
    early = price("sola_tiny", "SL/LL/LLSLLS/LS", 512)
    assert early.stages[0][0].gmacs > 2 * own.stages[0][0].gmacs
    assert early.stages[1] == own.stages[1]


def test_what_cannot_be_built_has_tiles_and_a_reason():
    # 48 channels are no multiple of 32
    invalid = price("sola_nano", "SL/LL/LLSLLS/LS", 224)
    assert invalid.summary == ""
    assert "48 channels" in invalid.error
    assert invalid.stages[0][0].text == "S"
    assert "4 numbers" in price("sola_nano", "LL/LL", 224).error or "2 stages" in price("sola_nano", "LL/LL", 224).error
    with pytest.raises(ValueError, match="not a layer"):
        price("sola_nano", "LX", 224)
