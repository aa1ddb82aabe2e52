# SPDX-License-Identifier: Apache-2.0
"""The architecture: `SolaConfig`, and the family as functions whose columns read like Table 7. Does not import torch.

Depths are derived from the schedule. tiny, small and base are the paper's; nano is ours.
"""

from dataclasses import dataclass, replace
from typing import Any

from sola_vision.schedule import Bridges, Schedule, parse_bridges, parse_schedule
from sola_vision.wording import amount


@dataclass(frozen=True, kw_only=True)
class SolaConfig:
    """The architecture of a SoLA-Vision network. Raises ValueError for inconsistent fields.

    Args:
        schedule: layer kinds, such as "LL/LL/LLSLLS/LS", with one stage for each of `dims`.
        dims: channels of each stage.
        bridges: Hidden State Bridges, such as "1.2>3.3 2.2>3.6"; "paper" for Table 7's; "" for none.
        patch_size: side of a stem patch in pixels; stage s (from 0) has stride patch_size * 2^s.
        img_size: image side in pixels that defines the position embedding's grid; it is interpolated for other sizes.
        in_chans: image channels.
        num_classes: outputs of the classifier; 0 removes it.
        head_dim: channels per attention head.
        token_shift: mix each token of a linear layer with its shifted neighbours.
        drop_path_rate: stochastic depth rate of the last layer; rises linearly from 0 at the first.
    """

    schedule: str
    dims: tuple[int, ...]
    bridges: str = ""
    patch_size: int = 4
    img_size: int = 224
    in_chans: int = 3
    num_classes: int = 1000
    head_dim: int = 32
    token_shift: bool = True
    drop_path_rate: float = 0.0

    def __post_init__(self) -> None:
        schedule = parse_schedule(self.schedule)
        object.__setattr__(self, "dims", tuple(self.dims))
        if len(self.dims) != len(schedule.stages):
            raise ValueError(
                f"schedule {self.schedule!r} has {amount(len(schedule.stages), 'stage')} but dims {self.dims} has "
                f"{amount(len(self.dims), 'entry', 'entries')}: give one number of channels per stage"
            )
        for name in ("patch_size", "img_size", "in_chans", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if min(self.dims) < 1 or self.num_classes < 0:
            raise ValueError(
                f"dims {self.dims} must be positive and num_classes={self.num_classes} must not be negative"
            )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate={self.drop_path_rate} must be in [0, 1)")
        for stage, (kinds, dim) in enumerate(zip(schedule.stages, self.dims, strict=True)):
            if "S" in kinds and dim % self.head_dim:
                raise ValueError(
                    f"stage {stage + 1} has softmax layers, so its {dim} channels must be a multiple of "
                    f"head_dim={self.head_dim}: change one of them"
                )
        if self.bridges == "paper":
            object.__setattr__(self, "bridges", _paper_bridges(self.schedule))
        parse_bridges(self.bridges, schedule)

    @property
    def parsed_schedule(self) -> Schedule:
        """The schedule as a `Schedule`."""
        return parse_schedule(self.schedule)

    @property
    def parsed_bridges(self) -> Bridges:
        """The bridges as `Bridges`."""
        return parse_bridges(self.bridges)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels between neighbouring tokens, per stage: 4, 8, 16, 32 for the family."""
        return tuple(self.patch_size * 2**stage for stage in range(len(self.dims)))

    def with_changes(self, **changes: Any) -> "SolaConfig":
        """A copy with some fields changed."""
        return replace(self, **changes)


# fmt: off
_SOLA      = "LL/LL/LLSLLS/LS"
_SOLA_BASE = "LL/LL/LLLSLLSLLSLLSLLS/LS"

# Table 7. Its column for B counts the targets in stage 3 from zero (from one, its S layers are 4, 7, 10, 13 and 16).
# not in the paper: everything else is counted from one, as for T and S. (3,2)L could also mean 3.3.
_BRIDGES = {
    _SOLA:      "1.2>3.3 2.2>3.6 3.2>4.2",
    _SOLA_BASE: "1.2>3.4 1.2>3.7 2.2>3.10 2.2>3.13 3.2>3.16 3.2>4.2",
}
# fmt: on


def _paper_bridges(schedule: str) -> str:
    if schedule not in _BRIDGES:
        raise ValueError(
            f"bridges='paper' is defined for Table 7's schedules {' and '.join(_BRIDGES)}, not for {schedule!r}: "
            "list the bridges, such as bridges='1.2>3.3', or omit them"
        )
    return _BRIDGES[schedule]


# not in the paper: stochastic depth rates of 0.1 / 0.2 / 0.5. The paper follows Swin without naming them; Swin uses
# 0.2 / 0.3 / 0.5 for 28 to 88 M parameters, and tiny is far smaller than Swin-T.
# fmt: off
def nano(**changes: Any) -> SolaConfig:
    """1.65 M parameters without head; not in the paper: for quick starts, tests and studies on two cores."""
    return SolaConfig(schedule=_SOLA,      dims=(48, 64, 96, 128)).with_changes(**changes)


def tiny(**changes: Any) -> SolaConfig:
    """SoLA-T of Table 7, with its bridges by bridges="paper": 6.2 M parameters, 1.9 GMACs at 224 x 224."""
    return SolaConfig(schedule=_SOLA,      dims=(96, 128, 192, 256),   drop_path_rate=0.1).with_changes(**changes)


def small(**changes: Any) -> SolaConfig:
    """SoLA-S of Table 7, with its bridges by bridges="paper": 31.1 M parameters, 4.9 GMACs at 224 x 224."""
    return SolaConfig(schedule=_SOLA,      dims=(96, 192, 384, 768),   drop_path_rate=0.2).with_changes(**changes)


def base(**changes: Any) -> SolaConfig:
    """SoLA-B of Table 7, with its bridges by bridges="paper": 88.4 M parameters, 15.4 GMACs at 224 x 224."""
    return SolaConfig(schedule=_SOLA_BASE, dims=(128, 256, 512, 1024), drop_path_rate=0.5).with_changes(**changes)
# fmt: on
