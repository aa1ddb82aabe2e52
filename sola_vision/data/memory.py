# SPDX-License-Identifier: Apache-2.0
"""Small images decoded once and kept in memory as bytes, for many short runs.

Training images are padded with zeros, randomly cropped and flipped; evaluation images are unchanged. A subset has the
same number of images of each class, and the same images for every seed of a run.
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
    """Images [N, 3, size, size] uint8, returned as normalised float tensors [3, size, size] with their labels."""

    def __init__(self, pixels: Tensor, targets: Sequence[int], *, augment: bool) -> None:
        self.size = pixels.shape[-1]
        # the usual random crop of 32-pixel images, also in Swin, has a padding of 4
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
    """Return uint8 [len(indices), 3, size, size]: the shorter side resized to `size`, then a centre crop."""
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
    """Return the indices of at most `limit` samples, with an equal share of each class as far as it has so many.

    At least one sample per class is returned; all samples if `limit` is None.
    """
    if limit is None or limit >= len(targets):
        return list(range(len(targets)))
    by_class = shuffled_by_class(targets)
    share = max(1, limit // len(by_class))
    return sorted(index for some in by_class for index in some[:share])


def shuffled_by_class(targets: Sequence[int]) -> list[list[int]]:
    """Return the indices of the samples of each class, in a fixed random order."""
    by_class: dict[int, list[int]] = {}
    for index in torch.randperm(len(targets), generator=torch.Generator().manual_seed(0)).tolist():
        by_class.setdefault(targets[index], []).append(index)
    return list(by_class.values())


def fingerprint(images: ImageFolder | Digits, indices: Sequence[int]) -> str:
    """Return a 12-character hash of the selected file names and labels, independent of the folder's location."""
    chosen = [(images.samples[index], images.targets[index]) for index in indices]
    return hashlib.blake2b(json.dumps(chosen).encode(), digest_size=6).hexdigest()
