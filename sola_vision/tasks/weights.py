# SPDX-License-Identifier: Apache-2.0
"""Weights with all that belongs to them: `save_pretrained` writes a folder, `load` gives a network back, as it was or
for other classes, channels and image sizes. What does not fit is never passed over in silence.

A folder holds `model.safetensors`, whose metadata has the network, its classes and its image settings, and
`config.json`, which says the same to timm: `timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
from timm.models import adapt_input_conv
from torch import Tensor, nn

from sola_vision.backbone import SolaVision
from sola_vision.data import ImageConfig
from sola_vision.engine import on_main, read_weights, save_weights, take_weights, write_json
from sola_vision.layers import resize_position
from sola_vision.tasks.model import (
    STANDARD,
    ModelConfig,
    create_network,
    foreign_metadata,
    metadata,
    network_arguments,
    own_fields,
    read_description,
    read_network,
    read_settings,
    weights_file,
)
from sola_vision.vrwkv import VisionRwkv
from sola_vision.vrwkv_weights import is_published, renamed

_log = logging.getLogger("sola_vision")


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and what its file says about it."""

    model: nn.Module
    task: str
    name: str
    classes: list[str]
    image: ImageConfig


def save_pretrained(
    model: nn.Module, folder: str | Path, *, classes: Sequence[str] | None = None, image: ImageConfig | None = None
) -> None:
    """Write a classifier or backbone with its configuration, classes and image settings, each file at once or not.

    classes: a name for each output; without them those that it was loaded with, or numbers.
    image: how pictures are prepared for it; without it as it was loaded, or as timm says of its name.
    Raises ValueError for what does not fit together or was pruned, OSError where it cannot be written.
    """
    folder = Path(folder)
    if folder.suffix == ".safetensors" or folder.is_file():
        raise ValueError(f"{folder}: save_pretrained writes a folder, not a file: name a folder")
    if (folder / "best.safetensors").exists():
        raise ValueError(f"{folder} is the folder of a run, whose best.safetensors goes first: name another folder")
    name, cfg = _identity(model)
    _check_whole(model)
    arguments = network_arguments(model)
    count: int = getattr(model, "num_classes", 0)
    known = cfg.get("label_names") or ()
    if len(known) != count:  # of a head that was replaced
        known = map(str, range(count))
    names = list(known if classes is None else classes)
    if len(names) != count or len(set(names)) != count or not all(isinstance(label, str) for label in names):
        raise ValueError(f"classes: {count} different names are needed, one for each output, not {names!r:.80}")
    image = image or _image(model, cfg)
    about = metadata("classification", ModelConfig(name=name), image, names, model)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / "model.safetensors", model, about)
    config = {
        "architecture": name,
        "num_classes": count,
        "num_features": getattr(model, "num_features", None),
        "label_names": names,
        "model_args": {key: value for key, value in arguments.items() if key != "num_classes"},
        "pretrained_cfg": {key: value for key, value in cfg.items() if key != "architecture" and value is not None}
        | _described(model, image, names),
    }
    on_main(lambda: write_json(folder / "config.json", config))


def load(
    path: str | Path,
    *,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    in_chans: int | None = None,
    img_size: int | None = None,
    partial: bool = False,
    **changes: Any,
) -> nn.Module:
    """The network of a folder that save_pretrained, `sola train` or timm wrote, of a file in it, or of Vision-RWKV's.

    It is ready for evaluation. What was adapted, missing, unexpected or resized is logged and is its `.load_report`;
    `.pretrained_cfg` has its classes and image settings, where timm looks for them.

    num_classes, classes: another number of outputs, or other names; the head is kept where the names stay, else fresh.
    in_chans: other input channels, for which the stem's weights are summed or repeated, as timm does.
    img_size: pixels a side of the images it will see; the position embedding is interpolated.
    partial: take what fits where the rest does not, instead of a ValueError.
    changes: other fields of the network, such as drop_path_rate, bridges, or eq9 of Vision-RWKV's.
    Raises FileNotFoundError or ValueError with one line for what is missing, damaged, unsafe or does not fit.
    """
    options = {"in_chans": in_chans, "img_size": img_size, **changes}
    asked = {key: value for key, value in options.items() if value is not None}
    return _load(path, num_classes, classes, asked, partial).model


def load_checkpoint(path: str | Path) -> Checkpoint:
    """A classifier for the commands, which read images of three channels, with nothing adapted.

    Raises FileNotFoundError or ValueError with one line if it is missing, damaged or of another program or task.
    """
    checkpoint = _load(path)
    if not checkpoint.classes:
        raise ValueError(f"{path} is a backbone without a head: a classifier is needed here")
    channels = getattr(checkpoint.model, "in_chans", 3)
    if channels != 3:
        raise ValueError(f"{path} takes images of {channels} channels: pictures are read as three, RGB")
    return checkpoint


def initialise(model: nn.Module, path: str | Path, classes: Sequence[str] | None = None) -> str:
    """Start from a checkpoint's weights; returns what happened, in one line.

    The head stays fresh where the number of classes differs, or their names if `classes` tells them; a position
    embedding of another size is interpolated; anything else that does not fit is a ValueError.
    """
    path = weights_file(path)
    stored = read_weights(path)
    told = _stored_classes(path)
    same = None if classes is None or told is None else told == list(classes)
    weights, adapted = adapt(model, stored, same)
    try:
        take_weights(model, weights, path)
    except ValueError as error:
        raise ValueError(f"{str(error).partition(';')[0]}; start from a checkpoint of the same network") from None
    return f"weights from {path}" + (f" ({', '.join(adapted)})" if adapted else "")


def adapt(
    model: nn.Module, stored: Mapping[str, Tensor], same_classes: bool | None
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Stored weights as `model` needs them, and what had to be changed: the grid of the position embedding, the stem's
    channels, and the head, which stays fresh for other classes; same_classes None: for another number of them.
    """
    own = model.state_dict()
    cfg = getattr(model, "pretrained_cfg", {})
    weights = renamed(stored) if is_published(stored) else dict(stored)
    said = []
    here, there = own.get("position.weight"), weights.get("position.weight")
    if here is not None and there is not None and here.shape != there.shape and here.shape[:-2] == there.shape[:-2]:
        weights["position.weight"] = resize_position(there, here.shape[-2:])
        said.append(f"position embedding {_grid(there)} interpolated to {_grid(here)}")
    for first in (f"{module}.weight" for module in _modules(cfg.get("first_conv"))):
        here, there = own.get(first), weights.get(first)
        if here is not None and there is not None and _but_for_channels(here) == _but_for_channels(there):
            inputs, outputs = there.shape[1], here.shape[1]
            if inputs != outputs:
                weights[first] = adapt_input_conv(outputs, there, base_chans=inputs)
                said.append(f"{first} from {inputs} to {outputs} channels")
    heads = tuple(f"{module}." for module in _modules(cfg.get("classifier")))
    for name in [name for name in (*own, *weights) if name.startswith(heads) and not same_classes]:
        if name not in own:
            del weights[name]
            said.append(f"{name} left out")
        elif same_classes is False or (name in weights and own[name].shape != weights[name].shape):
            weights[name] = own[name]
            said.append(f"{name} {_size(own[name])} fresh")
    return weights, tuple(dict.fromkeys(said))


def _load(
    path: str | Path,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    asked: Mapping[str, Any] | None = None,
    partial: bool = False,
) -> Checkpoint:
    path, values = read_description(path)
    saved, image = _settings(path, values)
    name, network = read_network(path, values)
    known = own_fields(name) | STANDARD
    changes = dict(asked or {})
    if unknown := sorted(set(changes) - known):
        raise ValueError(f"{name} has no {', '.join(unknown)}: what can be changed is {', '.join(sorted(known))}")
    names = _names(saved, num_classes, classes)
    image = replace(image, size=changes.get("img_size", image.size))
    if not own_fields(name):
        changes.pop("img_size", None)  # create_network gives it to those that want it
    model: Any = create_network(name, len(names), image.size, network | changes)
    weights, adapted = adapt(model, read_weights(path), names == saved)
    report = replace(take_weights(model, weights, path, partial=partial), adapted=adapted)
    if report or adapted:
        _log.warning("weights from %s: %s", path, report)
    model.load_report = report
    model.pretrained_cfg = {**model.pretrained_cfg, **_described(model, image, names)}
    return Checkpoint(model.eval(), str(values["task"]), name, names, image)


def _settings(path: Path, values: Mapping[str, Any]) -> tuple[list[str], ImageConfig]:
    """Classes and image settings of a classifier."""
    if values["task"] != "classification":
        raise ValueError(
            f"{path} is of the task {values['task']!r}: a checkpoint of a classifier is needed here; "
            "sola_vision.tasks.segmenter.load_segmenter and sola_vision.tasks.detector.load_detector read the others"
        )
    try:
        return [str(label) for label in values["classes"]], read_settings(ImageConfig, values["image"])
    except (AttributeError, TypeError, ValueError) as error:
        raise foreign_metadata(path, error) from None


def _names(saved: list[str], num_classes: int | None, classes: Sequence[str] | None) -> list[str]:
    if classes is not None:
        if num_classes not in (None, len(classes)):
            raise ValueError(f"num_classes={num_classes} beside {len(classes)} classes: give one of them")
        return [str(label) for label in classes]
    if num_classes is not None and num_classes < 0:
        raise ValueError(f"num_classes={num_classes} must not be negative; 0 leaves the head out")
    return saved if num_classes in (None, len(saved)) else [str(index) for index in range(num_classes)]


def _stored_classes(path: Path) -> list[str] | None:
    """The classes that a file tells; bare weights tell none."""
    try:
        classes = read_description(path)[1]["classes"]
    except ValueError:
        return None
    return classes if isinstance(classes, list) else None


def _identity(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """The network's name in timm's registry, and what timm says of it."""
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    name = cfg.get("architecture")
    if name is None and isinstance(model, SolaVision | VisionRwkv):
        # built without a name: any of the family does, since every field is kept
        name = "sola_tiny" if isinstance(model, SolaVision) else "vrwkv_tiny"
        cfg = timm.get_pretrained_cfg(name).to_dict()
    if name is None or not timm.is_model(name):
        raise ValueError(f"{type(model).__name__} is not in timm's registry, so that its name could bring it back")
    strange = sorted(set(getattr(model, "_model_args", {})) - STANDARD - {"drop_rate"}) if not own_fields(name) else []
    if strange:
        raise ValueError(f"{name} was built with {', '.join(strange)}: save it with timm's save_for_hf")
    return name, cfg


def _check_whole(model: nn.Module) -> None:
    """Refuses a network of ours whose modules are no longer those of its config, by which it would be built again."""
    if not isinstance(model, SolaVision | VisionRwkv):
        return
    kind: Any = type(model)
    own, built = (
        {name: tensor.shape for name, tensor in network.state_dict().items() if not name.startswith("head.")}
        for network in (model, kind(model.config, device="meta"))
    )
    differing = sorted(name for name in own.keys() | built.keys() if own.get(name) != built.get(name))
    if differing:
        raise ValueError(
            f"{len(differing)} parameters, {differing[0]} first, are not those that the network's config builds: it "
            "was pruned or changed; save its weights alone, with safetensors.torch.save_model"
        )


def _image(model: nn.Module, cfg: Mapping[str, Any]) -> ImageConfig:
    """How timm says that pictures are prepared; a network that was not loaded is as large as it was built."""
    size = cfg["input_size"][-1]
    if not hasattr(model, "load_report"):
        size = network_arguments(model).get("img_size", size)
        size = size if isinstance(size, int) else size[-1]
    settings = {key: cfg[key] for key in ("mean", "std", "interpolation", "crop_pct")}
    return read_settings(ImageConfig, {"size": size, **settings})


def _described(model: nn.Module, image: ImageConfig, names: list[str]) -> dict[str, Any]:
    """The same in timm's words."""
    return {
        "input_size": (getattr(model, "in_chans", 3), image.size, image.size),
        "mean": image.mean,
        "std": image.std,
        "interpolation": image.interpolation,
        "crop_pct": image.evaluated_part,
        "num_classes": len(names),
        "label_names": names,
    }


def _modules(names: str | Sequence[str] | None) -> tuple[str, ...]:
    """timm names one module, several (two heads, or streams of the stem), or none."""
    return (names,) if isinstance(names, str) else tuple(names or ())


def _but_for_channels(weight: Tensor) -> tuple[int, ...]:
    return (*weight.shape[:1], *weight.shape[2:])


def _grid(weight: Tensor) -> str:
    return _size(weight[0, 0])


def _size(x: Tensor) -> str:
    return "x".join(map(str, x.shape))
