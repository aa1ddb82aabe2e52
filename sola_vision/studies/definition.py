# SPDX-License-Identifier: Apache-2.0
"""What a study is: arms that differ in one thing, what stays the same, and what the paper says about their order.

The network's size, the images and the length of training belong to the scale (`scales`), so that one definition serves
the paper's scale and smaller ones.
"""

from dataclasses import dataclass
from typing import Literal

Size = Literal["tiny", "small", "base"]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One variant; its name is the row's in the table.

    change: what is done to the built network, a name of `changes.CHANGES`.
    paper: the paper's result in per cent, None where it prints none.
    paper_gmacs: its cost column.
    size: of the network, where a study has several; a scale leaves out arms of sizes that it does not have.
    """

    name: str
    schedule: str
    bridges: str = ""
    token_shift: bool = True
    change: str = ""
    paper: float | None = None
    paper_gmacs: float | None = None
    size: Size = "tiny"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement about order: on average the arms of `better` score above the arms of `worse`.

    source: where the paper says so; "" for a question of this project's own.
    """

    text: str
    better: tuple[str, ...]
    worse: tuple[str, ...]
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Study:
    """One table or figure.

    network: "hierarchical" (four stages, as SoLA) or "isotropic" (one stage, as the six-layer study).
    epochs, data: the paper's, data "" for a study that it does not have.
    cost_size: pixels a side at which it counts MACs.
    metric: a name in the results, in per cent.
    over: the horizontal axis of its figure; "depth" adds a panel over the number of layers.
    claims: what its text and numbers say.
    notes: what a reader has to know about it.
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
        # only runs of classification know what to do with one
        assert self.task == "classification" or not any(arm.change for arm in self.arms), names
        for claim in self.claims:
            assert set(claim.better + claim.worse) <= set(names), claim

    @property
    def measure(self) -> str:
        """The metric as a page calls it."""
        return "mIoU" if self.metric == "miou" else "top-1 accuracy"

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def paper_difference(self, claim: Claim) -> float | None:
        """What the paper's own numbers give for the claim, in points."""
        numbers = [[self.arm(name).paper for name in side] for side in (claim.better, claim.worse)]
        if any(number is None for side in numbers for number in side):
            return None
        better, worse = (sum(filter(None, side)) / len(side) for side in numbers)
        return better - worse
