# SPDX-License-Identifier: Apache-2.0
"""SoLA-Vision: a vision backbone of linear (Bi-WKV) and softmax attention layers, chosen by one string.

Importing it registers `sola_nano`, `sola_tiny`, `sola_small`, `sola_base` and Vision-RWKV's `vrwkv_*` with timm.
"""

from typing import TYPE_CHECKING, Any

from sola_vision.startup import uncollected
from sola_vision.version import __version__

with uncollected():
    from sola_vision import ops, sola, vrwkv
    from sola_vision.backbone import SolaVision
    from sola_vision.config import SolaConfig, base, nano, small, tiny
    from sola_vision.ops import wkv
    from sola_vision.schedule import parse_bridges, parse_schedule

if TYPE_CHECKING:
    from sola_vision.tasks import load, save_pretrained

__all__ = [
    "SolaConfig",
    "SolaVision",
    "__version__",
    "base",
    "load",
    "nano",
    "ops",
    "parse_bridges",
    "parse_schedule",
    "save_pretrained",
    "small",
    "sola",
    "tiny",
    "vrwkv",
    "wkv",
]


def __getattr__(name: str) -> Any:
    # imported on first use, because they import all tasks
    if name in ("load", "save_pretrained"):
        from sola_vision import tasks

        return getattr(tasks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
