# SPDX-License-Identifier: Apache-2.0
"""The teacher of distillation: a trained, frozen network, from a run of `sola train` or from timm.

It gets the student's images, in its own normalisation, and resized if it takes a single size only.
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
    """Selection of the teacher network.

    Args:
        name: a name in timm's registry, hf-hub:OWNER/NAME or local-dir:FOLDER; null = the name in the checkpoint.
        checkpoint: a run of sola train, or weights of timm (safetensors, pth) for the name; null = the weights
            published under the name.
        size: side in pixels of the images it gets; null = the student's, or its own if it takes one size only.
        sha256: checksum of its weights, recorded in config.yaml; a run only resumes with the same weights.
    """

    name: str | None = None
    checkpoint: str | None = None
    size: int | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None and not self.name.startswith(_ELSEWHERE) and not timm.is_model(self.name):
            raise ValueError(
                f"unknown teacher name {self.name!r}: use a timm name such as resnet50, "
                "hf-hub:OWNER/NAME or local-dir:FOLDER"
            )
        if self.size is not None and self.size < 1:
            raise ValueError(f"teacher size={self.size} must be at least 1")


class Teacher(nn.Module):
    """A frozen network: images [B, 3, H, W] of the student -> logits [B, classes] and feature maps [B, C_i, H_i, W_i].

    `classes` are the names of its classes, None if unknown; `size` is the side its images are resized to, None for no
    resizing. `normalisation` is its own mean and std; `shown` holds those of the student.
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
        shown_mean, shown_std = (torch.tensor(values).view(-1, 1, 1) for values in (shown.mean, shown.std))
        self.register_buffer("scale", shown_std / std)
        self.register_buffer("shift", (shown_mean - mean) / std)

    @torch.no_grad()
    def forward(self, images: Tensor, levels: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """Return logits and the feature maps `levels` (timm's indices, ascending)."""
        images = images * self.scale + self.shift
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            images = F.interpolate(images, (self.size, self.size), mode="bicubic", antialias=True)
        if not levels:
            return self.network(images), []
        last, maps = self.network.forward_intermediates(images, indices=list(levels))
        return self.network.forward_head(last), maps

    @property
    def sha256(self) -> str:
        """The checksum of its weights' names, dtypes, shapes and bits, independent of the file format."""
        digest = hashlib.sha256()
        for name, value in sorted(self.network.state_dict().items()):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def load_teacher(config: TeacherConfig, shown: ImageConfig) -> Teacher:
    """Load the teacher of a run whose images are prepared by `shown`.

    Raise FileNotFoundError or ValueError if it is missing, damaged, of another network or not the one that the run was
    started with.
    """
    path = None if config.checkpoint is None else Path(config.checkpoint)
    if path is not None and (path.is_dir() or _is_own_file(path)):
        teacher = _from_run(config, path, shown)
    elif config.name is not None:
        teacher = _from_timm(config, config.name, path, shown)
    elif path is not None:
        raise ValueError(f"{path} does not name its network: add --teacher.name with a timm name")
    else:
        raise ValueError(
            "distillation needs a teacher: use --teacher.checkpoint RUN with a run of sola train, "
            "or --teacher.name NAME and --teacher.checkpoint FILE with weights of timm's network NAME"
        )
    if config.sha256 not in (None, sha256 := teacher.sha256):
        raise ValueError(
            f"the weights of the teacher {teacher.name} are not those that the run was started with (sha256 "
            f"{sha256[:12]}... instead of {str(config.sha256)[:12]}...): use the same teacher, "
            "or start another run with --teacher.sha256 null"
        )
    side = teacher.size or shown.size
    try:
        answers, _ = teacher(torch.zeros(1, 3, side, side))
    # raised by timm's networks for a size that they do not support
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"the teacher {teacher.name} cannot take images of {side} pixels ({first_line(error)}): set --teacher.size"
        ) from None
    if not answers.isfinite().all():
        raise ValueError(f"the teacher {teacher.name} returns nan or inf: its weights are damaged, use others")
    return teacher


def _is_own_file(path: Path) -> bool:
    """True if the file was written by this package."""
    return path.suffix == ".safetensors" and "task" in read_metadata(path)


def _from_run(config: TeacherConfig, path: Path, shown: ImageConfig) -> Teacher:
    loaded = load_checkpoint(path)
    if config.name not in (None, loaded.name):
        raise ValueError(f"{path} is a checkpoint of {loaded.name}, not of {config.name}: omit --teacher.name")
    image = loaded.image
    size = image.size if takes_one_size(loaded.name) else None
    return Teacher(
        loaded.model, loaded.name, loaded.classes, _size(config, loaded.name, size), (image.mean, image.std), shown
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
    except Exception as error:  # hubs, folders and networks fail in many ways
        raise ValueError(
            f"the teacher {name} could not be loaded ({first_line(error)}): use --teacher.name, and "
            "--teacher.checkpoint with a file of its weights"
        ) from None


def _stored(name: str, path: Path) -> Any:
    if name.startswith(_ELSEWHERE):
        raise ValueError(f"{name} includes its weights: omit --teacher.checkpoint {path}, or use a timm name")
    stored = read_weights(path)
    cfg = timm.get_pretrained_cfg(name)
    head = cfg.classifier if cfg else None
    weight = stored.get(f"{head[0] if isinstance(head, tuple | list) else head}.weight")
    # weights published without a head: build the network without one
    network = create_network(name, 0 if weight is None else weight.shape[0], cfg.input_size[-1] if cfg else 224, {})
    report = LoadReport.of(network.state_dict(), stored)
    if report:
        raise ValueError(f"{path} does not fit the teacher {name}: {report}; use weights of that network")
    network.load_state_dict(stored)
    return network


def _size(config: TeacherConfig, name: str, only: int | None) -> int | None:
    if only is not None and config.size not in (None, only):
        raise ValueError(f"the teacher {name} takes images of {only} pixels only: omit --teacher.size")
    return only or config.size


def _class_names(network: Any) -> list[str] | None:
    """Return the names in the network's configuration, ImageNet's synset ids if their number fits, else None."""
    if names := network.pretrained_cfg.get("label_names"):
        return [str(name) for name in names]
    subset = infer_imagenet_subset(network)
    return None if subset is None else ImageNetInfo(subset).label_names()


def first_line(error: Exception) -> str:
    """Return the first line of an error's message that is not blank, or the error's type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
