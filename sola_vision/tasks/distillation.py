# SPDX-License-Identifier: Apache-2.0
"""Distillation: classification in which a teacher's answers and feature maps are learned beside the labels.

    loss = (1 - a) labels + a targets + b features

    targets   soft: T^2 KL(teacher || student) of probabilities at temperature T (Hinton et al., arXiv 1503.02531);
              hard: cross-entropy with the teacher's class (Touvron et al., DeiT, arXiv 2012.12877)
    features  one minus the correlation, over channels, of the teacher's map and a linear projection of the student's
              (Romero et al., FitNets, arXiv 1412.6550; normalised targets as in Wei et al., arXiv 2205.14141)

Student and teacher see the same image, mixed and augmented alike (Beyer et al., arXiv 2106.05237).
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


@dataclass(kw_only=True)
class DistillConfig:
    """What is learned from the teacher.

    Args:
        targets: its probabilities (soft), its class (hard) or neither (none); auto = soft if its classes have the
            names of the data's, else none.
        target_weight: share of the targets in the loss of the answers; the labels have the rest.
        temperature: divides both networks' logits before soft targets are compared.
        feature_weight: of the feature maps' loss; 0 = they are not compared.
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
    """The network that learns, with a projection of each map that is compared to the teacher's channels.

    images -> logits [B, classes]; while it trains also the projected maps, a list of [B, C_i, H_i, W_i].
    """

    def __init__(
        self, network: nn.Module, levels: Sequence[int] = (), channels: Sequence[tuple[int, int]] = ()
    ) -> None:
        """levels: timm's indices of the compared maps; channels: (student's, teacher's) of each."""
        super().__init__()
        self.network: Any = network
        self.levels = list(levels)
        self.projections = nn.ModuleList(nn.Conv2d(mine, theirs, 1) for mine, theirs in channels)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, list[Tensor]]:
        if not self.training:
            return self.network(images)
        if not self.levels:
            return self.network(images), []
        last, maps = self.network.forward_intermediates(images, indices=self.levels)
        projected = [project(x) for project, x in zip(self.projections, maps, strict=True)]
        return self.network.forward_head(last), projected

    def no_weight_decay(self) -> set[str]:
        names = self.network.no_weight_decay() if hasattr(self.network, "no_weight_decay") else ()
        return {f"network.{name}" for name in names}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's groups for layer-wise decay: the network's own; projections learn at the full rate."""
        if not hasattr(self.network, "group_matcher"):
            raise ValueError(
                f"layer_decay needs a network with group_matcher(), which {type(self.network).__name__} lacks"
            )
        return {name: below("network.", what) for name, what in self.network.group_matcher(coarse).items()}


class Distillation(Classification):
    """Classification with a teacher; the model is a `Student`, the teacher is no part of it.

    columns: where the data's classes are among the teacher's, None: its answers are not learned; levels: timm's indices
    of the teacher's maps that the student's are compared with.
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
        self.teacher = teacher
        self.config = config
        self.columns = None if columns is None else list(columns)
        self.levels = list(levels)
        self.ceiling: float | None = None  # the teacher's own top-1; it never changes

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
            losses = [feature_loss(mine, theirs) for mine, theirs in zip(maps, taught, strict=True)]
            parts["features"] = torch.stack(losses).mean()
            loss = loss + self.config.feature_weight * parts["features"]
        return loss, parts

    def _target_loss(self, logits: Tensor, answers: Tensor) -> Tensor:
        if self.config.targets == "hard":
            return F.cross_entropy(logits, answers.argmax(1))
        return soft_loss(logits, answers, self.config.temperature)

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        """The student's metrics, and the teacher's top-1 on the same images if it has their classes."""
        metrics = super().evaluate(model, batches)
        if self.columns is None:
            return metrics
        if self.ceiling is None:
            tally = Tally.of(self.num_classes)
            for images, labels in batches:
                tally.add(self.teacher(images)[0][:, self.columns], labels)
            self.ceiling = tally.reduced(next(model.parameters()).device).metrics["top1"]
        return {**metrics, "teacher_top1": self.ceiling}


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student), logits [B, classes]; T^2 keeps the gradient's size as T grows."""
    mine, theirs = ((logits / temperature).log_softmax(1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(mine, theirs, reduction="batchmean", log_target=True)


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over positions of 1 - correlation over channels: [B, C, h, w] and [B, C, H, W], which is resampled."""
    if teacher.shape[-2:] != student.shape[-2:]:
        teacher = F.interpolate(teacher.float(), student.shape[-2:], mode="bilinear", antialias=True)
    # not in a paper as such: both sides normalised at each position, so that no layer's scale needs a weight
    mine, theirs = (F.layer_norm(x.float().movedim(1, -1), x.shape[1:2]) for x in (student, teacher))
    return 0.5 * F.mse_loss(mine, theirs)


def find_columns(targets: str, teacher: Teacher, classes: Sequence[str]) -> tuple[list[int] | None, str]:
    """Where the data's classes are among the teacher's, None if its answers are not to be learned; and a line on it.

    ValueError where targets are asked for that the teacher does not have.
    """
    if targets == "none":
        return None, ""
    names, count = teacher.classes, teacher.network.num_classes
    if names is None and count == len(classes):
        if targets == "auto":
            return None, (
                f"nothing says which classes the teacher's {count} outputs are: only its feature maps are learned; "
                "--distill.targets soft says that they are the data's, sorted by name"
            )
        return list(range(count)), f"the teacher's {count} outputs are taken for the data's classes, sorted by name"
    if names is None:
        why = f"the teacher has {count or 'no'} outputs, the data {len(classes)} classes"
    elif missing := [name for name in classes if name not in names]:
        why = f"{len(missing)} of the data's {len(classes)} classes are not the teacher's, such as {missing[0]!r}"
    else:
        return [names.index(name) for name in classes], ""
    if targets == "auto":
        return None, f"{why}: only its feature maps are learned"
    raise ValueError(f"--distill.targets {targets}: {why}; leave it out to learn from feature maps only")


def map_levels(network: Any, name: str, size: int) -> list[tuple[int, int]]:
    """(stride, channels) of a network's feature maps, by timm's index; ValueError where it has none."""
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            maps = network.forward_intermediates(torch.zeros(1, 3, size, size), intermediates_only=True)
        strides = [level["reduction"] for level in network.feature_info]
        return [(stride, x.shape[1]) for stride, x in zip(strides, maps, strict=True)]
    # networks without maps, and those whose maps are not what timm's contract says
    except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{name} has no feature maps to compare ({first_line(error)}): "
            "--distill.feature_weight 0 leaves them out, or choose another network"
        ) from None
    finally:
        network.train(training)


def pair_maps(student: Sequence[int], teacher: Sequence[int]) -> list[tuple[int, int]]:
    """Which map of the student learns from which of the teacher, by their strides: the last from the last, any other
    from the one of its stride. Of several maps of a stride the last counts.

    not in a paper as such: a teacher of one stride, such as a ViT, is compared at its end only.
    """
    mine, theirs = ({stride: index for index, stride in enumerate(strides)} for strides in (student, teacher))
    ends = (len(student) - 1, len(teacher) - 1)
    pairs = [(mine[stride], theirs[stride]) for stride in mine if stride in theirs]
    return sorted([(a, b) for a, b in pairs if a != ends[0] and b != ends[1]] + [ends])
