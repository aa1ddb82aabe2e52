# SPDX-License-Identifier: Apache-2.0
"""Search for schedules under a budget: `space` defines the candidates, `costs` prices them, `methods` selects one.

The default method trains a supernet whose open layers contain every alternative (`supernet`). Random search, evolution
and the paper's rule serve as baselines.
"""

from .costs import Costs, latency_costs, mac_costs
from .methods import METHODS, Found, Point, Problem, rule, search
from .space import Space

__all__ = [
    "METHODS",
    "Costs",
    "Found",
    "Point",
    "Problem",
    "Space",
    "latency_costs",
    "mac_costs",
    "rule",
    "search",
]
