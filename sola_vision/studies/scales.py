# SPDX-License-Identifier: Apache-2.0
"""How large a study is: network, images, length of training, seeds. The definitions of `catalogue` hold for each scale.

`paper` is the paper's own recipe; `small` fits two CPU cores, and `medium` a GPU for an afternoon.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sola_vision import config
from sola_vision.config import SolaConfig
from sola_vision.data import ImageConfig
from sola_vision.engine import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Everything about a run that a study does not say.

    hierarchical, isotropic: the networks; a study puts in schedules and bridges.
    images: how images are loaded; None: decoded once, held in memory, randomly cropped and flipped.
    limit: training images, the same ones in every run; None: all.
    epochs: by kind of network; empty: the study's own number.
    train: everything else of the training.
    seeds: runs of each arm.
    """

    name: str
    what: str
    hierarchical: SolaConfig
    isotropic: SolaConfig
    images: ImageConfig | None
    limit: int | None
    epochs: Mapping[str, int] = field(default_factory=dict)
    train: TrainConfig
    seeds: int = 3

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.hierarchical.img_size


PAPER = Scale(
    name="paper",
    what="the paper's recipe: SoLA-T, or 192 channels at patch 16 in stacks of one stage; 224 pixels, batches of 1024",
    hierarchical=config.tiny(),
    # the paper does not print the stack's width and patch; these fit its costs (docs/reconstruction.md)
    isotropic=SolaConfig(schedule="LLLLLL", dims=(192,), patch_size=16, drop_path_rate=0.1),
    images=ImageConfig(),
    limit=None,
    train=TrainConfig(
        batch_size=1024,
        lr=1e-3,
        min_lr=1e-5,
        warmup_epochs=20,
        weight_decay=0.05,
        clip=5.0,
        amp="bf16",
        evaluate_every=10,
    ),
)

MEDIUM = Scale(
    name="medium",
    what="networks of 1.7 M parameters at 32 pixels, up to 50,000 training images, 30 epochs",
    hierarchical=SolaConfig(
        schedule="LL/LL/LLSLLS/LS", dims=(48, 64, 96, 128), patch_size=1, img_size=32, drop_path_rate=0.05
    ),
    isotropic=SolaConfig(schedule="LLLLLL", dims=(128,), patch_size=4, img_size=32, drop_path_rate=0.05),
    images=None,
    limit=50_000,
    epochs={"hierarchical": 30, "isotropic": 30},
    train=TrainConfig(
        batch_size=128, lr=2e-3, min_lr=1e-5, warmup_epochs=2, weight_decay=0.05, amp="bf16", evaluate_every=1000
    ),
    seeds=5,
)

# stem patch 1, so that stage 3 has 8 x 8 tokens; sized for minutes a run on one core
SMALL = Scale(
    name="small",
    what="networks of 0.3 to 0.7 M parameters at 32 pixels, up to 20,000 training images, 2 or 3 epochs",
    hierarchical=SolaConfig(schedule="LL/LL/LLSLLS/LS", dims=(16, 32, 64, 96), patch_size=1, img_size=32, head_dim=16),
    isotropic=SolaConfig(schedule="LLLLLL", dims=(64,), patch_size=4, img_size=32, head_dim=16),
    images=None,
    limit=20_000,
    epochs={"hierarchical": 2, "isotropic": 3},
    train=TrainConfig(
        batch_size=32,
        lr=1.5e-3,
        min_lr=1e-5,
        warmup_epochs=0.2,
        weight_decay=0.05,
        workers=0,
        evaluate_every=1000,
        save_seconds=120,
        log_every=100,
    ),
)

SCALES = {scale.name: scale for scale in (SMALL, MEDIUM, PAPER)}
