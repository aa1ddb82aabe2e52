# SPDX-License-Identifier: Apache-2.0
"""Distillation: classification that learns a teacher's outputs and feature maps in addition to the labels.

    loss = (1 - a) labels + a targets + b features

    targets   soft: T^2 KL(teacher || student) of probabilities at temperature T (Hinton et al., arXiv 1503.02531);
              hard: cross-entropy with the teacher's class (Touvron et al., DeiT, arXiv 2012.12877)
    features  one minus the correlation, over channels, of the teacher's map and a linear projection of the student's
              (Romero et al., FitNets, arXiv 1412.6550; normalised targets as in Wei et al., arXiv 2205.14141)

Student and teacher get the same augmented and mixed images (Beyer et al., arXiv 2106.05237).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sola_vision.data import ImageConfig
from sola_vision.tasks.classification import Classification, Tally
from sola_vision.tasks.pyramid import below
from sola_vision.tasks.teacher import Teacher, first_line
from sola_vision.wording import amount


@dataclass(kw_only=True)
class DistillConfig:
    """Settings of the distillation losses.

    Args:
        targets: learn the teacher's probabilities (soft), its predicted class (hard) or neither (none); auto = soft if
            its classes have the names of the data's classes, else none.
        target_weight: weight of the teacher's targets in the classification loss; the labels have the rest.
        temperature: divides the logits of both networks before soft targets are compared.
        feature_weight: weight of the feature map loss; 0 = feature maps are not compared.
    """

    targets: Literal["auto", "soft", "hard", "none"] = "auto"
    target_weight: float = 0.5
    temperature: float = 2.0
    feature_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.target_weight <= 1:
            raise ValueError(f"target_weight={self.target_weight} must lie in [0, 1]")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be a number above 0")
        if not 0 <= self.feature_weight < math.inf:
            raise ValueError(f"feature_weight={self.feature_weight} must be a number, 0 or above")


class Student(nn.Module):
    """The network to train, with a projection of each compared feature map to the teacher's channels.

    images -> logits [B, classes]; in training also the projected maps, a list of [B, C_i, H_i, W_i].
    """

    def __init__(
        self, network: nn.Module, levels: Sequence[int] = (), channels: Sequence[tuple[int, int]] = ()
    ) -> None:
        """levels: timm's indices of the compared maps; channels: (student, teacher) channels of each."""
        super().__init__()
        self.network: Any = network
        self.levels = list(levels)
        self.projections = nn.ModuleList(nn.Conv2d(inputs, outputs, 1) for inputs, outputs in channels)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        if not self.training:
            return self.network(images)
        if not self.levels:
            return self.network(images), []
        last, maps = self.network.forward_intermediates(images, indices=self.levels)
        projected = [project(x) for project, x in zip(self.projections, maps, strict=True)]
        return self.network.forward_head(last), projected

    def no_weight_decay(self) -> set[str]:
        """Return the names of the network's parameters without weight decay."""
        names = self.network.no_weight_decay() if hasattr(self.network, "no_weight_decay") else ()
        return {f"network.{name}" for name in names}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's groups for layer-wise decay: the network's; projections use the full rate."""
        if not hasattr(self.network, "group_matcher"):
            raise ValueError(
                f"layer_decay needs a network with group_matcher(), which {type(self.network).__name__} lacks"
            )
        return {name: below("network.", what) for name, what in self.network.group_matcher(coarse).items()}


class Distillation(Classification):
    """Classification with a teacher; the model is a `Student` and does not contain the teacher.

    columns: index of each of the data's classes among the teacher's, or None to ignore its outputs; levels: timm's
    indices of the teacher's maps that the student's are compared with.
    """

    def __init__(
        self,
        num_classes: int,
        image: ImageConfig,
        teacher: Teacher,
        config: DistillConfig,
        columns: Sequence[int] | None,
        levels: Sequence[int],
    ) -> None:
        super().__init__(num_classes, image)
        self.printed["teacher_top1"] = "%"
        self.teacher = teacher
        self.config = config
        self.columns = None if columns is None else list(columns)
        self.levels = list(levels)
        self.teacher_top1: float | None = None  # computed once, because the teacher never changes

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels = self.mixed(batch)
        answers, taught = self.teacher(images, self.levels)
        logits, maps = model(images)
        logits = logits.float()
        loss = self.criterion(logits, labels)
        parts = {"labels": loss}
        if self.columns is not None:
            parts["targets"] = self._target_loss(logits, answers.float()[:, self.columns])
            loss = torch.lerp(loss, parts["targets"], self.config.target_weight)
        if maps:
            losses = [feature_loss(own, target) for own, target in zip(maps, taught, strict=True)]
            parts["features"] = torch.stack(losses).mean()
            loss = loss + self.config.feature_weight * parts["features"]
        return loss, parts

    def _target_loss(self, logits: Tensor, answers: Tensor) -> Tensor:
        if self.config.targets == "hard":
            return F.cross_entropy(logits, answers.argmax(1))
        return soft_loss(logits, answers, self.config.temperature)

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        """Return the student's metrics, and the teacher's top-1 on the same images if it has their classes."""
        metrics = super().evaluate(model, batches)
        if self.columns is None:
            return metrics
        if self.teacher_top1 is None:
            tally = Tally.of(self.num_classes)
            for images, labels in batches:
                tally.add(self.teacher(images)[0][:, self.columns], labels)
            self.teacher_top1 = tally.reduced(next(model.parameters()).device).metrics["top1"]
        return {**metrics, "teacher_top1": self.teacher_top1}


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) of logits [B, classes]; T^2 keeps the gradient's scale as T grows."""
    own, target = ((logits / temperature).log_softmax(1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(own, target, reduction="batchmean", log_target=True)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over positions of 1 - correlation over channels of [B, C, h, w] and a resampled [B, C, H, W]."""
    if teacher.shape[-2:] != student.shape[-2:]:
        teacher = F.interpolate(teacher.float(), student.shape[-2:], mode="bilinear", antialias=True)
    # not in a paper as such: both sides are normalised at each position, so that no layer's scale needs a weight
    own, target = (F.layer_norm(x.float().movedim(1, -1), x.shape[1:2]) for x in (student, teacher))
    return 0.5 * F.mse_loss(own, target)


def find_columns(targets: str, teacher: Teacher, classes: Sequence[str]) -> tuple[list[int] | None, str]:
    """Return the index of each of the data's classes among the teacher's, or None to ignore its outputs, and a note.

    Raise ValueError if `targets` needs classes that the teacher does not have.
    """
    if targets == "none":
        return None, ""
    names, count = teacher.classes, teacher.network.num_classes
    if names is None and count == len(classes):
        if targets == "auto":
            return None, (
                f"the classes of the teacher's {count} outputs are unknown: only its feature maps are learned; use "
                "--distill.targets soft if they are the data's, sorted by name"
            )
        return list(range(count)), f"the teacher's {count} outputs are taken as the data's classes, sorted by name"
    if names is None:
        outputs = amount(count, "output") if count else "no outputs"
        why = f"the teacher has {outputs}, but the data has {len(classes)} classes"
    elif missing := [name for name in classes if name not in names]:
        why = f"the teacher lacks {len(missing)} of the data's {len(classes)} classes, such as {missing[0]!r}"
    else:
        return [names.index(name) for name in classes], ""
    if targets == "auto":
        return None, f"{why}: only its feature maps are learned"
    raise ValueError(f"--distill.targets {targets}: {why}; omit the option to learn from feature maps only")


def map_levels(network: Any, name: str, size: int) -> list[tuple[int, int]]:
    """Return (stride, channels) of each of a network's feature maps, by timm's index; ValueError if it has none."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            maps = network.forward_intermediates(torch.zeros(1, 3, size, size), intermediates_only=True)
        strides = [level["reduction"] for level in network.feature_info]
        return [(stride, x.shape[1]) for stride, x in zip(strides, maps, strict=True)]
    # networks without maps, and those whose maps do not follow timm's conventions
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} has no feature maps to compare ({first_line(error)}): "
            "use --distill.feature_weight 0, or choose another network"
        ) from None
    finally:
        network.train(training)


def pair_maps(student: Sequence[int], teacher: Sequence[int]) -> list[tuple[int, int]]:
    """Return pairs (student map, teacher map) by strides: the two last maps, and any others with equal strides.

    Of several maps with the same stride the last is used.

    not in a paper as such: a teacher with a single stride, such as a ViT, is compared at its last map only.
    """
    own, target = ({stride: index for index, stride in enumerate(strides)} for strides in (student, teacher))
    ends = (len(student) - 1, len(teacher) - 1)
    pairs = [(own[stride], target[stride]) for stride in own if stride in target]
    return sorted([(a, b) for a, b in pairs if a != ends[0] and b != ends[1]] + [ends])
