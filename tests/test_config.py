# SPDX-License-Identifier: Apache-2.0
"""The family's columns, and configurations that do not fit together."""

import dataclasses

import pytest

from sola_vision.config import SolaConfig, base, nano, small, tiny


def test_family_follows_table_7():
    assert tiny().dims == (96, 128, 192, 256)
    assert small().dims == (96, 192, 384, 768)
    assert base().dims == (128, 256, 512, 1024)
    assert [c().parsed_schedule.depths for c in (nano, tiny, small, base)] == [(2, 2, 6, 2)] * 3 + [(2, 2, 16, 2)]
    assert tiny().strides == (4, 8, 16, 32)


@pytest.mark.parametrize("config", [nano, tiny, small, base])
def test_paper_bridges_fit_every_size_and_only_its_schedule(config):
    bridged = config(bridges="paper")
    kinds = bridged.parsed_schedule
    assert all(kinds.kind(b.source) == "L" and kinds.kind(b.target) == "S" for b in bridged.parsed_bridges.bridges)
    assert config().bridges == ""
    with pytest.raises(ValueError, match="Table 7"):
        config(schedule="LL/LL/LLLLLS/LS", bridges="paper")


def test_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny().dims = (1,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": (96, 128)}, "4 stages but dims"),
        ({"dims": (96, 128, 200, 256)}, "stage 3 has softmax layers, so its 200 channels"),
        ({"bridges": "4.1>1.1"}, "does not go forward"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"schedule": "LL/LL/LLSLLT/LS"}, "'T' is not a layer"),
        ({"num_classes": -1}, "num_classes=-1"),
    ],
)
def test_config_states_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


def test_isotropic_stack_is_a_one_stage_schedule():
    config = SolaConfig(schedule="LLLSLL", dims=[192], patch_size=16)
    assert config.dims == (192,)
    assert config.strides == (16,)
