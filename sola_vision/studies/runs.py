# SPDX-License-Identifier: Apache-2.0
"""One training of a study: everything that determines its result, and the key that follows from it.

`Run` is of classification; `segmentation` has the other kind. What else a training needs is a `Job`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from sola_vision.analysis.cost import count
from sola_vision.backbone import SolaVision
from sola_vision.config import SolaConfig
from sola_vision.data import ImageConfig, SegmentationConfig
from sola_vision.engine import TrainConfig
from sola_vision.engine.config import FREE, Task
from sola_vision.engine.loading import Collate
from sola_vision.tasks import Classification, ModelConfig, metadata

from .changes import CHANGES
from .images import Images


@dataclass(frozen=True)
class Job:
    """What `engine.fit` wants to know of a run beside its images."""

    task: Task
    model: nn.Module
    metadata: dict[str, str] | None
    eval_collate: Collate | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """An arm of a study, and a seed (in `train`)."""

    arm: str
    config: SolaConfig
    change: str
    train: TrainConfig
    images: ImageConfig | SegmentationConfig | None
    identity: dict[str, Any]

    @property
    def seed(self) -> int:
        return self.train.seed

    def with_seed(self, seed: int) -> "Run":
        return replace(self, train=replace(self.train, seed=seed))

    @property
    def definition(self) -> dict[str, Any]:
        """Everything that determines the result."""
        train = {name: value for name, value in asdict(self.train).items() if name not in FREE}
        images = "crop and flip" if self.images is None else asdict(self.images)
        network = {**asdict(self.config), "change": self.change}
        # lists for tuples, as it will be read again
        return json.loads(json.dumps({"network": network, "train": train, "images": images, "data": self.identity}))

    @property
    def key(self) -> str:
        identity = {name: value for name, value in self.identity.items() if name != "name"}
        text = json.dumps({**self.definition, "data": identity}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def backbone(self, device: str | None = None) -> SolaVision:
        model = SolaVision(self.config, device=device)
        if self.change:
            CHANGES[self.change](model)
        return model

    def build(self, device: str | None = None) -> nn.Module:
        """The whole network, with fresh weights."""
        return self.backbone(device)

    def cost(self, size: int) -> dict[str, int]:
        """Parameters with the head, MACs of one image without it, as the paper counts."""
        cost = count(self.backbone("meta").eval(), (size, size))
        head = sum(row.macs for row in cost.rows if row.module.startswith("head"))
        return {"parameters": cost.parameters, "macs": cost.macs - head}

    def prepare(self, images: Any) -> Job:
        """`images` are the plan's."""
        assert isinstance(images, Images)
        torch.manual_seed(self.seed)  # of the initial weights
        model = self.build()
        named = metadata("classification", ModelConfig(name="sola_tiny"), images.settings, images.classes, model)
        return Job(
            Classification(images.identity.classes, images.settings),
            model,
            # a changed network has other weights than its schedule tells: sola eval could not load it
            metadata=None if self.change else named,
        )
