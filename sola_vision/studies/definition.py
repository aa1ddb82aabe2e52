# SPDX-License-Identifier: Apache-2.0
"""The definition of a study: arms that differ in one respect, and the paper's claims about their order.

The size of the network, the images and the length of training belong to the scale (`scales`), so that one definition
serves both the paper's scale and smaller ones.
"""

from dataclasses import dataclass
from typing import Literal

Size = Literal["tiny", "small", "base"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One variant, a row of the table.

    change: a modification of the built network, a key of `changes.CHANGES`; "" for none.
    paper: the paper's result in per cent, None if it prints none.
    paper_gmacs, paper_params: the paper's cost in GMACs, and its millions of parameters.
    size: the size of the network, for studies with several; a scale skips arms of sizes that it does not have.
    """

    name: str
    schedule: str
    bridges: str = ""
    token_shift: bool = True
    change: str = ""
    paper: float | None = None
    paper_gmacs: float | None = None
    paper_params: float | None = None
    size: Size = "tiny"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement about order: the mean of the arms in `better` is above the mean of the arms in `worse`.

    source: the place in the paper; "" for an additional question.
    """

    text: str
    better: tuple[str, ...]
    worse: tuple[str, ...]
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Study:
    """One table or figure.

    network: "hierarchical" (four stages, like SoLA) or "isotropic" (one stage, like the six-layer study).
    epochs, data: those of the paper; data is "" for a study that is not in the paper.
    cost_size: side of the images, in pixels, at which the paper counts MACs.
    metric: a key of the results, in per cent.
    over: the horizontal axis of its figure; "depth" adds a panel over the number of layers.
    claims: orders stated by the paper's text and numbers.
    notes: remarks printed on the page.
    """

    name: str
    title: str
    varies: str
    fixed: str
    network: Literal["hierarchical", "isotropic"]
    arms: tuple[Arm, ...]
    claims: tuple[Claim, ...]
    data: str = "the 100-class subset of ImageNet-1K"
    epochs: int = 300
    cost_size: int = 224
    task: Literal["classification", "segmentation"] = "classification"
    metric: str = "top1"
    over: Literal["cost", "depth"] = "cost"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        assert len(set(names)) == len(names), names
        # only classification runs support changes
        assert self.task == "classification" or not any(arm.change for arm in self.arms), names
        for claim in self.claims:
            assert set(claim.better + claim.worse) <= set(names), claim

    @property
    def measure(self) -> str:
        """The name of the metric on a page."""
        return "mIoU" if self.metric == "miou" else "top-1 accuracy"

    def arm(self, name: str) -> Arm:
        """Return the arm called `name`."""
        return next(arm for arm in self.arms if arm.name == name)

    def paper_difference(self, claim: Claim) -> float | None:
        """Return the difference for a claim by the paper's numbers, in points; None if it prints none."""
        numbers = [[self.arm(name).paper for name in side] for side in (claim.better, claim.worse)]
        if any(number is None for side in numbers for number in side):
            return None
        better, worse = (sum(filter(None, side)) / len(side) for side in numbers)
        return better - worse
