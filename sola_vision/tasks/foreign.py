# SPDX-License-Identifier: Apache-2.0
"""Descriptions of weights written by other programs, in the format of this package's checkpoint metadata.

Two kinds are supported: a folder of timm's with a config.json (`save_for_hf`, the Hugging Face hub), and Vision-RWKV's
files.
"""

import json
import logging
from functools import cache
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo

from sola_vision.engine import read_weights
from sola_vision.vrwkv_weights import from_published, is_published
from sola_vision.wording import amount

_log = logging.getLogger("sola_vision")

_TIMM = ("model.safetensors", "pytorch_model.bin")
_IMAGE = ("mean", "std", "interpolation", "crop_pct")


def describe(path: Path) -> dict[str, Any] | None:
    """Return the task, model, image settings and classes of a file, or None if they are unknown."""
    config = path.with_name("config.json")
    if config.is_file() and path.name in _TIMM:
        return _timm(config)
    weights = read_weights(path)
    try:
        if not is_published(weights):
            return None
        name, network = from_published(weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    size = timm.get_pretrained_cfg(name).input_size[-1]
    classes = _imagenet(network["num_classes"])
    return {"task": "classification", "model": {"name": name, **network}, "image": {"size": size}, "classes": classes}


def _timm(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        cfg = config.get("pretrained_cfg", config)  # older files have one level
        name = config["architecture"]
        count = int(config.get("num_classes", cfg.get("num_classes", 0)))
        channels, *_, size = cfg["input_size"]
        model = {"name": name, "in_chans": channels, **config.get("model_args", {})}
        image = {"size": size} | {key: cfg[key] for key in _IMAGE if cfg.get(key) is not None}
        image |= {key: [float(number) for number in image[key]] for key in ("mean", "std") if key in image}
        names = config.get("label_names") or cfg.get("label_names") or _imagenet(count)
        if len(names) != count:
            raise ValueError(f"{amount(len(names), 'name')} in label_names for {amount(count, 'class', 'classes')}")
        classes = [names[str(index)] for index in range(count)] if isinstance(names, dict) else names
        if cfg.get("crop_mode") not in (None, "center"):
            _warn_crop(file, cfg["crop_mode"])
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(
            f"{file} is not a config.json written by timm ({error!r}): write it with timm's save_for_hf"
        ) from None
    return {"task": "classification", "model": model, "image": image, "classes": classes}


@cache  # warn once, although a file is described more than once
def _warn_crop(file: Path, mode: str) -> None:
    _log.warning(
        "%s: crop_mode %s is not supported: images are cropped at the centre, so accuracy may differ", file, mode
    )


def _imagenet(count: int) -> list[str]:
    """Return class names for a file without names: ImageNet's synset ids for 1000 classes, else numbers."""
    return ImageNetInfo().label_names() if count == 1000 else [str(index) for index in range(count)]
