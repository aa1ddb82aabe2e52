# SPDX-License-Identifier: Apache-2.0
"""A teacher: a trained network of the user's that never changes, as a run of `sola train` or as timm writes networks.

It sees the images that the student sees, in its own normalisation, and at its own size where it takes one only.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F

from sola_vision.data import ImageConfig
from sola_vision.engine import LoadReport, read_metadata, read_weights
from sola_vision.tasks.model import create_network, takes_one_size
from sola_vision.tasks.weights import load_checkpoint

_ELSEWHERE = ("hf-hub:", "hf_hub:", "local-dir:")


@dataclass(kw_only=True)
class TeacherConfig:
    """Which network teaches.

    Args:
        name: a name that timm knows, hf-hub:OWNER/NAME or local-dir:FOLDER; null = the checkpoint says it.
        checkpoint: a run of sola train, or weights of timm's (safetensors, pth) for the name; null = those that are
            published under the name.
        size: pixels a side at which it sees the images; null = the student's, or its own if it takes one size only.
        sha256: of its weights. A run notes it in config.yaml and goes on with no others.
    """

    name: str | None = None
    checkpoint: str | None = None
    size: int | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None and not self.name.startswith(_ELSEWHERE) and not timm.is_model(self.name):
            raise ValueError(
                f"teacher name {self.name!r} is unknown: a name of timm's such as resnet50, "
                "hf-hub:OWNER/NAME or local-dir:FOLDER"
            )
        if self.size is not None and self.size < 1:
            raise ValueError(f"teacher size={self.size} must be at least 1")


class Teacher(nn.Module):
    """images [B, 3, H, W], normalised for the student -> logits [B, classes], and its maps [B, C_i, H_i, W_i].

    `classes` are the names of its classes, None where nothing says them; `size` the side of the images it is shown,
    None: as they come. `normalisation` is its own mean and std, `shown` has those of the student.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        network: nn.Module,
        name: str,
        classes: list[str] | None,
        size: int | None,
        normalisation: tuple[Sequence[float], Sequence[float]],
        shown: ImageConfig,
    ) -> None:
        super().__init__()
        self.network: Any = network.eval().requires_grad_(False)
        self.name, self.classes, self.size = name, classes, size
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in normalisation)
        theirs, spread = (torch.tensor(values).view(-1, 1, 1) for values in (shown.mean, shown.std))
        self.register_buffer("scale", spread / std)
        self.register_buffer("shift", (theirs - mean) / std)

    @torch.no_grad()
    def forward(self, images: Tensor, levels: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """`levels`: which of its maps, by timm's index, from the first to the last."""
        images = images * self.scale + self.shift
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        if not levels:
            return self.network(images), []
        last, maps = self.network.forward_intermediates(images, indices=list(levels))
        return self.network.forward_head(last), maps

    @property
    def sha256(self) -> str:
        """Of its weights' names, shapes and bits, whatever file they came from."""
        digest = hashlib.sha256()
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def load_teacher(config: TeacherConfig, shown: ImageConfig) -> Teacher:
    """The teacher of a run whose images are as `shown` says.

    Raises FileNotFoundError or ValueError with one line if it is missing, damaged, of another network or not the one
    that the run began with.
    """
    path = None if config.checkpoint is None else Path(config.checkpoint)
    if path is not None and (path.is_dir() or _is_ours(path)):
        teacher = _from_run(config, path, shown)
    elif config.name is not None:
        teacher = _from_timm(config, config.name, path, shown)
    elif path is not None:
        raise ValueError(f"{path} does not say of which network it is: give --teacher.name as well, a name of timm's")
    else:
        raise ValueError(
            "distilling needs a teacher: --teacher.checkpoint RUN, a run of sola train, "
            "or --teacher.name NAME with --teacher.checkpoint FILE, weights of timm's network NAME"
        )
    if config.sha256 not in (None, found := teacher.sha256):
        raise ValueError(
            f"the weights of the teacher {teacher.name} are not those that the run began with (sha256 {found[:12]}... "
            f"instead of {str(config.sha256)[:12]}...): give it that teacher again, "
            "or begin another run with --teacher.sha256 null"
        )
    side = teacher.size or shown.size
    try:
        answers, _ = teacher(torch.zeros(1, 3, side, side))
    # what timm's networks do with a size that they were not made for
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"the teacher {teacher.name} cannot see images of {side} pixels ({first_line(error)}): give --teacher.size"
        ) from None
    if not answers.isfinite().all():
        raise ValueError(f"the teacher {teacher.name} answers with nan or inf: its weights are damaged, give others")
    return teacher


def _is_ours(path: Path) -> bool:
    return path.suffix == ".safetensors" and "task" in read_metadata(path)


def _from_run(config: TeacherConfig, path: Path, shown: ImageConfig) -> Teacher:
    found = load_checkpoint(path)
    if config.name not in (None, found.name):
        raise ValueError(f"{path} is of {found.name}, not of {config.name}: leave --teacher.name out")
    image = found.image
    size = image.size if takes_one_size(found.name) else None
    return Teacher(
        found.model, found.name, found.classes, _size(config, found.name, size), (image.mean, image.std), shown
    )


def _from_timm(config: TeacherConfig, name: str, path: Path | None, shown: ImageConfig) -> Teacher:
    network = _published(name) if path is None else _stored(name, path)
    cfg = network.pretrained_cfg
    only = cfg["input_size"][-1] if cfg.get("fixed_input_size") else None
    normalisation = cfg.get("mean") or IMAGENET_DEFAULT_MEAN, cfg.get("std") or IMAGENET_DEFAULT_STD
    return Teacher(network, name, _class_names(network), _size(config, name, only), normalisation, shown)


def _published(name: str) -> Any:
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # a hub, a folder or a network has many ways to fail
        raise ValueError(
            f"the teacher {name} cannot be had ({first_line(error)}): give --teacher.name and --teacher.checkpoint, "
            "a file with its weights"
        ) from None


def _stored(name: str, path: Path) -> Any:
    if name.startswith(_ELSEWHERE):
        raise ValueError(f"{name} brings its own weights: leave --teacher.checkpoint {path} out, or give timm's name")
    stored = read_weights(path)
    cfg = timm.get_pretrained_cfg(name)
    head = cfg.classifier if cfg else None
    weight = stored.get(f"{head[0] if isinstance(head, tuple | list) else head}.weight")
    # weights that were published without a head have none to give
    network = create_network(name, 0 if weight is None else weight.shape[0], cfg.input_size[-1] if cfg else 224, {})
    report = LoadReport.of(network.state_dict(), stored)
    if report:
        raise ValueError(f"{path} does not fit the teacher {name}: {report}; give the weights of that network")
    network.load_state_dict(stored)
    return network


def _size(config: TeacherConfig, name: str, only: int | None) -> int | None:
    if only is not None and config.size not in (None, only):
        raise ValueError(f"the teacher {name} takes images of {only} pixels only: leave --teacher.size out")
    return only or config.size


def _class_names(network: Any) -> list[str] | None:
    """Those in its configuration; ImageNet's folder names where there are as many classes; else nothing says them."""
    if names := network.pretrained_cfg.get("label_names"):
        return [str(name) for name in names]
    subset = infer_imagenet_subset(network)
    return None if subset is None else ImageNetInfo(subset).label_names()


def first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
