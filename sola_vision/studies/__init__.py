# SPDX-License-Identifier: Apache-2.0
"""The paper's tables and figures as runs, and ours in the same way: one definition each, in `catalogue`.

A study is run into one folder by any number of processes (`runner`), and its page is written from what lies there
(`report`). `catalogue` is the file to read first.
"""

from .catalogue import STUDIES, custom, get_study
from .definition import Arm, Claim, Study
from .pages import write_report
from .planning import Plan, plan
from .runner import run_plan
from .scales import SCALES, Scale

__all__ = [
    "SCALES",
    "STUDIES",
    "Arm",
    "Claim",
    "Plan",
    "Scale",
    "Study",
    "custom",
    "get_study",
    "plan",
    "run_plan",
    "write_report",
]
