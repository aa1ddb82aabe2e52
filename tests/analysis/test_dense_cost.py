# SPDX-License-Identifier: Apache-2.0
"""The backbone's cost at the sizes of dense tasks, compared with Tables 4 and 5, and the cost of bridges."""

import pytest

from sola_vision.analysis.paper import ROWS, compare_with_paper
from sola_vision.analysis.paper import _count as count


@pytest.mark.parametrize("table", ["4", "5"])
@pytest.mark.parametrize("name", ["SoLA-T", "SoLA-S"])
def test_tiny_and_small_are_within_two_percent_of_the_paper(table, name):
    (row,) = [row for row in ROWS if (row.table, row.method) == (table, name)]
    (compared,) = compare_with_paper([row])
    assert compared.gmacs == pytest.approx(row.gmacs, rel=0.02)


@pytest.mark.parametrize("size", [(1333, 800), (512, 512)])
@pytest.mark.parametrize("network", ["sola_tiny", "sola_small", "sola_base"])
def test_bridges_cost_at_most_three_percent(network, size):
    without, with_bridges = count(network, size, ""), count(network, size, "paper")
    assert 1 < with_bridges.macs / without.macs < 1.03
