# SPDX-License-Identifier: Apache-2.0
"""Studies: the paper's tables and figures, and further questions, as sets of runs; one definition each in `catalogue`.

Any number of processes can run a study into one folder (`runner`), from which its page is written (`pages`). Read
`catalogue` first.
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
