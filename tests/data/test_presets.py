# SPDX-License-Identifier: Apache-2.0
"""The transforms: Swin's recipe step by step, correct geometry and normalisation, any image size."""

import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from sola_vision.data import EvalTransform, ImageConfig, TrainTransform


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def seeded(seed: int = 0) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def test_train_transform_is_swins_recipe():
    crop, flip, augment, to_tensor, normalise, erase = TrainTransform(ImageConfig()).pipeline.transforms
    assert (crop.size, crop.scale, crop.ratio) == ((224, 224), (0.08, 1.0), (3 / 4, 4 / 3))
    assert crop.interpolation == transforms.InterpolationMode.BICUBIC
    assert flip.p == 0.5
    assert augment.num_layers == 2
    assert len(augment.ops) == 15
    assert {(op.prob, op.magnitude, op.magnitude_std) for op in augment.ops} == {(0.5, 9, 0.5)}
    assert {"PosterizeIncreasing", "SolarizeIncreasing"} < {op.name for op in augment.ops}
    assert augment.ops[0].kwargs["fillcolor"] == (124, 116, 104)
    assert type(to_tensor).__name__ == "MaybeToTensor"
    assert torch.allclose(normalise.mean, torch.tensor([0.485, 0.456, 0.406]))
    assert torch.allclose(normalise.std, torch.tensor([0.229, 0.224, 0.225]))
    assert (erase.probability, erase.per_pixel, erase.min_count, erase.max_count) == (0.25, True, 1, 1)
    assert (erase.min_area, erase.max_area) == (0.02, 1 / 3)
    # and the settings for batches, which are applied elsewhere
    config = ImageConfig()
    assert (config.mixup, config.cutmix, config.mixup_prob, config.smoothing) == (0.8, 1.0, 1.0, 0.1)


@pytest.mark.parametrize("size", [(300, 500), (500, 300), (224, 224), (40, 90)])
def test_eval_transform_is_swins(size):
    swin = transforms.Compose(
        [
            transforms.Resize(int((256 / 224) * 224), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    image = noise(*size)
    assert torch.equal(EvalTransform(ImageConfig())(image), swin(image))


def test_eval_transform_of_small_images_changes_nothing_but_the_range():
    image = noise(32, 32)
    config = ImageConfig(size=32, mean=(0, 0, 0), std=(1, 1, 1))
    assert torch.equal(EvalTransform(config)(image), transforms.ToTensor()(image))


def test_train_transform_of_small_images_only_shifts_without_augmentation():
    image = noise(32, 32)
    config = ImageConfig(size=32, mean=(0, 0, 0), std=(1, 1, 1), hflip=0, auto_augment=None, color_jitter=0, erasing=0)
    padded = torch.nn.functional.pad(transforms.ToTensor()(image), (4, 4, 4, 4))
    transform = TrainTransform(config)
    for seed in range(5):
        seeded(seed)
        got = transform(image)
        assert any(torch.equal(got, padded[:, y : y + 32, x : x + 32]) for y in range(9) for x in range(9))


def test_train_transform_of_small_images_takes_a_given_scale():
    crop = TrainTransform(ImageConfig(size=32, scale=(0.5, 1.0))).pipeline.transforms[0]
    assert crop.scale == (0.5, 1.0)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
@pytest.mark.parametrize("config", [ImageConfig(size=32), ImageConfig(size=96)], ids=["32", "96"])
def test_transforms_take_any_image_and_repeat_under_a_seed(config, mode):
    for width, height in ((8, 8), (1, 1), (300, 20), (7, 400)):
        image = noise(width, height, mode)
        for transform in (TrainTransform(config), EvalTransform(config)):
            copy = pickle.loads(pickle.dumps(transform))
            seeded()
            first = transform(image)
            seeded()
            assert torch.equal(first, copy(image))
            assert first.shape == (3, config.size, config.size)
            assert first.dtype == torch.float32
            assert torch.isfinite(first).all()


def test_eval_transform_of_an_endless_strip_keeps_its_centre_and_little_memory():
    strip = np.zeros((1, 20_000, 3), np.uint8)
    strip[0, 10_000 - 40 : 10_000 + 40] = 255
    # resized whole, it would take 3.9 GB
    got = EvalTransform(ImageConfig(mean=(0, 0, 0), std=(1, 1, 1)))(Image.fromarray(strip))
    assert got.min() == 1


def test_eval_transform_crops_a_long_image_as_if_it_were_resized_whole():
    image = noise(16 * 9, 16)
    config = ImageConfig(size=56, mean=(0, 0, 0), std=(1, 1, 1))
    whole = transforms.Compose(
        [transforms.Resize(64, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(56), transforms.ToTensor()]
    )
    assert torch.equal(EvalTransform(config)(image), whole(image))


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 0},
        {"interpolation": "cubic"},
        {"crop_pct": 1.5},
        {"scale": (0.9, 0.1)},
        {"ratio": (0.0, 1.0)},
        {"hflip": -0.1},
        {"erasing": 2.0},
        {"smoothing": 1.5},
        {"mixup": -1.0},
    ],
)
def test_image_config_names_the_wrong_value(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=name) as caught:
        ImageConfig(**wrong)
    assert str(value) in str(caught.value)
