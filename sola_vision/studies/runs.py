# SPDX-License-Identifier: Apache-2.0
"""One run of a study: everything that determines its result, and the key derived from it.

`Run` is a classification run; `segmentation` defines the other kind. A `Job` contains the objects that it trains.
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
    """The arguments of `engine.fit` for a run, except its images."""

    task: Task
    model: nn.Module
    metadata: dict[str, str] | None
    eval_collate: Collate | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One arm of a study with one seed (`train.seed`)."""

    arm: str
    config: SolaConfig
    change: str
    train: TrainConfig
    images: ImageConfig | SegmentationConfig | None
    identity: dict[str, Any]

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.train.seed

    def with_seed(self, seed: int) -> "Run":
        """Return the same run with another seed."""
        return replace(self, train=replace(self.train, seed=seed))

    @property
    def definition(self) -> dict[str, Any]:
        """Everything that determines the result."""
        train = {name: value for name, value in asdict(self.train).items() if name not in FREE}
        images = "crop and flip" if self.images is None else asdict(self.images)
        network = {**asdict(self.config), "change": self.change}
        # tuples become lists, as after reading the file
        return json.loads(json.dumps({"network": network, "train": train, "images": images, "data": self.identity}))

    @property
    def key(self) -> str:
        """A hash of the definition; the name of the images' folder is not part of it."""
        identity = {name: value for name, value in self.identity.items() if name != "name"}
        text = json.dumps({**self.definition, "data": identity}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def backbone(self, device: str | None = None) -> SolaVision:
        """Return the network with fresh weights and the arm's change."""
        model = SolaVision(self.config, device=device)
        if self.change:
            CHANGES[self.change](model)
        return model

    def build(self, device: str | None = None) -> nn.Module:
        """Return the whole network with fresh weights."""
        return self.backbone(device)

    def cost(self, size: int) -> dict[str, int]:
        """Return parameters including the head, and MACs of one image without it, as in the paper."""
        cost = count(self.backbone("meta").eval(), (size, size))
        head = sum(row.macs for row in cost.rows if row.module.startswith("head"))
        return {"parameters": cost.parameters, "macs": cost.macs - head}

    def prepare(self, images: Any) -> Job:
        """Return the job of this run; `images` are those of the plan."""
        assert isinstance(images, Images)
        torch.manual_seed(self.seed)  # determines the initial weights
        model = self.build()
        named = metadata("classification", ModelConfig(name="sola_tiny"), images.settings, images.classes, model)
        return Job(
            Classification(images.identity.classes, images.settings),
            model,
            # the weights of a changed network do not match its schedule: sola eval could not load them
            metadata=None if self.change else named,
        )
