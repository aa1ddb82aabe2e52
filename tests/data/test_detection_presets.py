# SPDX-License-Identifier: Apache-2.0
"""Transforms of detection: image, boxes and masks stay aligned under all of them."""

import random

import numpy as np
import pytest
import torch
from PIL import Image

from sola_vision.data import CocoFolder, DetectionConfig, DetectionEvalTransform, DetectionTrainTransform, collate_lists
from sola_vision.data.scenes import write_coco

pytest.importorskip("faster_coco_eval", reason="needs the extra [det]")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes")
    write_coco(root, train=6, val=1, size=(90, 120))
    return CocoFolder(root, "train")


@pytest.mark.parametrize(
    ("size", "wanted"),
    [((480, 640), (800, 1067)), ((427, 640), (800, 1199)), ((300, 900), (444, 1333)), ((640, 424), (1208, 800))],
)
def test_sizes_of_the_1x_schedule(size, wanted):
    assert DetectionConfig().resized(*size) == wanted


def test_images_may_keep_their_size():
    config = DetectionConfig(size=None, zoom=1.5, longest=1000)
    assert config.resized(256, 320) == (384, 480)
    assert config.resized(1024, 1024) == (1000, 1000)


def tight(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.parametrize("crop", [None, 48])
@pytest.mark.parametrize(("hflip", "vflip"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_boxes_and_masks_stay_together(scenes, crop, hflip, vflip):
    config = DetectionConfig(size=72, longest=200, crop=crop, scale=(0.7, 1.4), hflip=hflip, vflip=vflip)
    transform = DetectionTrainTransform(config)
    random.seed(0)
    objects = 0
    for index in range(len(scenes)):
        image, target = transform(*scenes[index])
        assert image.dtype == torch.uint8
        assert crop is None or max(image.shape[1:]) <= crop
        assert target["masks"].shape == (len(target["boxes"]), *image.shape[1:])
        assert len(target["labels"]) == len(target["boxes"])
        for box, mask in zip(target["boxes"].numpy(), target["masks"].numpy(), strict=True):
            assert np.abs(np.array(tight(mask)) - box).max() <= 1.5
            # the shapes are bright on a dark ground: pixels, mask and box are at the same place
            assert image[:, mask.astype(bool)].float().amax(0).mean() > 150
            objects += 1
    assert objects > 3


def test_mirroring_is_that_of_the_whole(scenes):
    plain = DetectionTrainTransform(DetectionConfig(size=64, hflip=0))(*scenes[0])
    mirrored = DetectionTrainTransform(DetectionConfig(size=64, hflip=1))(*scenes[0])
    assert torch.equal(plain[0].flip(2), mirrored[0])
    assert torch.equal(plain[1]["masks"].flip(2), mirrored[1]["masks"])
    width = plain[0].shape[2]
    boxes = plain[1]["boxes"]
    assert torch.allclose(
        mirrored[1]["boxes"], torch.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), 1)
    )


def test_a_window_without_objects_and_objects_without_masks(scenes):
    image, objects = scenes[0]
    empty = type(objects)(1, objects.size, np.zeros((0, 4)), np.zeros(0, np.int64), None, [])
    _, target = DetectionTrainTransform(DetectionConfig(size=64))(image, empty)
    assert target["boxes"].shape == (0, 4)
    assert target["boxes"].dtype == torch.float32
    assert "masks" not in target


def test_evaluation_hands_out_the_whole_image(scenes):
    image, objects = scenes[0]
    pixels, target = DetectionEvalTransform()(image, objects)
    assert target == {"image_id": 1}
    assert (pixels.permute(1, 2, 0).numpy() == np.asarray(image)).all()


def test_batches_are_lists():
    samples = [(torch.zeros(3, 4, 5), {"image_id": 1}), (torch.zeros(3, 6, 7), {"image_id": 2})]
    images, targets = collate_lists(samples)
    assert [tuple(image.shape) for image in images] == [(3, 4, 5), (3, 6, 7)]
    assert [target["image_id"] for target in targets] == [1, 2]


def test_colours_change_only_with_jitter(scenes):
    image, objects = scenes[0]
    whole = DetectionConfig(size=90, hflip=0, color_jitter=0.5)
    jittered, _ = DetectionTrainTransform(whole)(image, objects)
    plain, _ = DetectionTrainTransform(DetectionConfig(size=90, hflip=0))(image, objects)
    assert torch.equal(plain, torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy()))
    assert not torch.equal(plain, jittered)


WRONG = {
    "size=16": {"size": 16},
    "zoom=2": {"zoom": 2},
    "zoom=0": {"size": None, "zoom": 0},
    "scale": {"scale": (2, 1)},
    "hflip=2": {"hflip": 2},
    "std": {"std": (1, 0, 1)},
    "color_jitter=-1": {"color_jitter": -1},
}


@pytest.mark.parametrize("says", WRONG)
def test_wrong_settings_are_refused(says):
    with pytest.raises(ValueError, match=says):
        DetectionConfig(**WRONG[says])


def test_the_image_of_training_is_that_of_evaluation(scenes):
    """Training resizes PIL images in workers, evaluation tensors on the device: the same pixels up to rounding."""
    from sola_vision.tasks.rcnn import Preparation

    config = DetectionConfig(size=45, longest=60, hflip=0, mean=(0, 0, 0), std=(1, 1, 1))
    image, objects = scenes[1]
    training, _ = DetectionTrainTransform(config)(image, objects)
    preparation = Preparation(config).eval()
    batch, _ = preparation([DetectionEvalTransform()(image, objects)[0]])
    assert batch.image_sizes == [(45, 60)]
    assert batch.tensors.shape[-2:] == (64, 64)
    assert (batch.tensors[0, :, :45, :60] * 255 - training).abs().max() <= 1
    assert Image.fromarray(training.permute(1, 2, 0).numpy()).size == (60, 45)
