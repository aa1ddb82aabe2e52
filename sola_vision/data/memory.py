# SPDX-License-Identifier: Apache-2.0
"""Small images decoded once and held in memory as bytes, for runs that are many and short.

Training crops them from a border of zeros and flips them, nothing more; evaluation takes them whole. A fixed subset
of a set has as many images of every class, the same ones for every seed of a run.
"""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from .digits import Digits
from .folder import ImageFolder


class MemoryImages(Dataset[tuple[Tensor, int]]):
    """Images [N, 3, size, size] of bytes, given out as normalised float tensors [3, size, size] with their labels."""

    def __init__(self, pixels: Tensor, targets: Sequence[int], *, augment: bool) -> None:
        self.size = pixels.shape[-1]
        # Swin's and everybody's crop for images of 32 pixels has a border of 4
        self.border = self.size // 8 if augment else 0
        self.augment = augment
        self.pixels = torch.nn.functional.pad(pixels, [self.border] * 4)
        self.targets = list(targets)
        self.mean = 255 * torch.tensor(IMAGENET_DEFAULT_MEAN).view(3, 1, 1)
        self.std = 255 * torch.tensor(IMAGENET_DEFAULT_STD).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.pixels[index]
        if self.augment:
            top, left = torch.randint(0, 2 * self.border + 1, (2,)).tolist()
            image = image[:, top : top + self.size, left : left + self.size]
            if torch.rand(()) < 0.5:
                image = image.flip(-1)
        return image.float().sub_(self.mean).div_(self.std), self.targets[index]


def decode(images: ImageFolder | Digits, size: int, indices: Sequence[int]) -> Tensor:
    """Bytes [len(indices), 3, size, size]: the shorter side resized to `size`, then the centre."""
    fit = transforms.Compose(
        [
            transforms.Resize(size, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
        ]
    )
    pixels = torch.empty(len(indices), 3, size, size, dtype=torch.uint8)
    for place, index in enumerate(indices):
        image = images.image(index).convert("RGB")
        if image.size != (size, size):
            image = fit(image)
        pixels[place] = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels


def balanced_subset(targets: Sequence[int], limit: int | None) -> list[int]:
    """Indices of at most `limit` samples, or of one a class where these are more; each class has as many as it has of
    an equal share. Without a limit all.
    """
    if limit is None or limit >= len(targets):
        return list(range(len(targets)))
    by_class = shuffled_by_class(targets)
    share = max(1, limit // len(by_class))
    return sorted(index for some in by_class for index in some[:share])


def shuffled_by_class(targets: Sequence[int]) -> list[list[int]]:
    """Indices of the samples of each class, always in the same random order."""
    by_class: dict[int, list[int]] = {}
    for index in torch.randperm(len(targets), generator=torch.Generator().manual_seed(0)).tolist():
        by_class.setdefault(targets[index], []).append(index)
    return list(by_class.values())


def fingerprint(images: ImageFolder | Digits, indices: Sequence[int]) -> str:
    """Twelve letters that tell this selection of files and labels from any other, wherever the folder lies."""
    chosen = [(images.samples[index], images.targets[index]) for index in indices]
    return hashlib.blake2b(json.dumps(chosen).encode(), digest_size=6).hexdigest()
