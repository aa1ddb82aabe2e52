# SPDX-License-Identifier: Apache-2.0
"""Schedules that are learned under a budget: `space` says which and what they cost, `methods` finds one.

The method of choice trains one network whose open layers hold everything that they may be (`supernet`); random search,
evolution and the paper's rule are there to be compared with.
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
