# SPDX-License-Identifier: Apache-2.0
"""Weights with their description: `save_pretrained` writes a folder, `load` restores the network, unchanged or adapted
to other classes, channels and image sizes. Every mismatch is reported.

A folder holds `model.safetensors`, whose metadata has the network, its classes and its image settings, and
`config.json`, the same for timm: `timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
from timm.models import adapt_input_conv
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from sola_vision.backbone import SolaVision
from sola_vision.data import ImageConfig
from sola_vision.engine import on_main, read_weights, save_weights, take_weights, write_json
from sola_vision.layers import resize_position
from sola_vision.tasks.model import (
    STANDARD,
    ModelConfig,
    create_network,
    explain_mismatch,
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
from sola_vision.vrwkv_weights import renamed
from sola_vision.wording import amount

_log = logging.getLogger("sola_vision")


@dataclass(frozen=True)
class Checkpoint:
    """A trained network with the metadata of its file."""

    model: nn.Module
    task: str
    name: str
    classes: list[str]
    image: ImageConfig


def save_pretrained(
    model: nn.Module, folder: str | Path, *, classes: Sequence[str] | None = None, image: ImageConfig | None = None
) -> None:
    """Write a classifier or backbone with its configuration, classes and image settings; each file atomically.

    classes: a name for each output; default: the names it was loaded with, or numbers.
    image: preprocessing of its images; default: the settings it was loaded with, or timm's for its name.
    What torch.compile or DistributedDataParallel returned is saved as the network inside. Raise ValueError if the
    arguments do not match, a network was quantised, or one of this package was pruned, changed or is inside of another
    module, OSError if it cannot be written.
    """
    folder, model = Path(folder), unwrap_model(model)
    if folder.suffix == ".safetensors" or folder.is_file():
        raise ValueError(f"{folder}: save_pretrained writes a folder, not a file: give the path of a folder")
    if (folder / "best.safetensors").exists():
        raise ValueError(f"{folder} is the folder of a run, whose best.safetensors is loaded first: use another folder")
    name, cfg = _identity(model)
    _check_tensors(model)
    _check_whole(model)
    arguments = network_arguments(model)
    count: int = getattr(model, "num_classes", 0)
    known = cfg.get("label_names") or ()
    if len(known) != count:  # the head was replaced
        known = [str(index) for index in range(count)]
    given = known if classes is None else classes
    names = list(given)
    strings = not isinstance(given, str) and all(isinstance(label, str) for label in names)
    if len(names) != count or len(set(names)) != count or not strings:
        right = amount(count, "different name")
        raise ValueError(f"classes must be a list of {right}, one for each output (got {given!r:.80})")
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
    """Load a network from a folder written by save_pretrained, `sola train` or timm, a file in it, or Vision-RWKV's.

    It is in evaluation mode. Adapted, missing, unexpected and resized tensors are logged and stored as `.load_report`;
    `.pretrained_cfg` holds its classes and image settings, as timm expects.

    num_classes, classes: another number of outputs, or other names; unless the names match, the head is initialised.
    in_chans: other input channels, for which the stem's weights are summed or repeated, as in timm.
    img_size: side in pixels of its images; the position embedding is interpolated.
    partial: load the tensors that match and report the others, instead of a ValueError.
    changes: other fields of the network, such as drop_path_rate, bridges, or eq9 of Vision-RWKV.
    Raise FileNotFoundError or ValueError if something is missing, damaged, unsafe or does not match.
    """
    options = {"in_chans": in_chans, "img_size": img_size, **changes}
    requested = {key: value for key, value in options.items() if value is not None}
    if not isinstance(side := requested.get("img_size", 1), int):
        raise ValueError(f"img_size={side} must be one number, the side of the square position embedding in pixels")
    return _load(path, num_classes, classes, requested, partial).model


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Load a classifier for the commands, which read images of three channels, without adapting it.

    Raise FileNotFoundError or ValueError if it is missing, damaged, or written by another program or for another task.
    """
    checkpoint = _load(path)
    if not checkpoint.classes:
        raise ValueError(f"{path} is a backbone without a head: use a checkpoint of a classifier")
    channels = getattr(checkpoint.model, "in_chans", 3)
    if channels != 3:
        kind = f"images of {amount(channels, 'channel')}"
        raise ValueError(f"{path} takes {kind}, but images are read as RGB: use 3 channels")
    return checkpoint


def initialise(model: nn.Module, path: str | Path, classes: Sequence[str] | None = None) -> str:
    """Initialise `model` from a checkpoint's weights; return a one-line description.

    The head is newly initialised if the number of classes differs, or their names if `classes` is given; a position
    embedding of another size is interpolated. Raise ValueError if anything else does not match.
    """
    path = weights_file(path)
    stored = read_weights(path)
    saved = _stored_classes(path)
    same = None if classes is None or saved is None else saved == list(classes)
    weights, adapted = adapt(model, stored, same)
    try:
        take_weights(model, weights, path)
    except ValueError as error:
        hint = explain_mismatch(path, model) or "use a checkpoint of the same network"
        raise ValueError(f"{str(error).partition(';')[0]}; {hint}") from None
    return f"weights from {path}" + (f" ({', '.join(adapted)})" if adapted else "")


def adapt(
    model: nn.Module, stored: Mapping[str, Tensor], same_classes: bool | None
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return stored weights adapted to `model`, and a note on each change.

    The grid of the position embedding and the stem's channels are adapted, and the head is newly initialised for other
    classes; if same_classes is None, for another number of them.
    """
    own = model.state_dict()
    cfg = getattr(model, "pretrained_cfg", {})
    weights = renamed(stored) if isinstance(model, VisionRwkv) else dict(stored)
    notes = []
    new, old = own.get("position.weight"), weights.get("position.weight")
    if new is not None and old is not None and new.shape != old.shape and new.shape[:-2] == old.shape[:-2]:
        weights["position.weight"] = resize_position(old, new.shape[-2:])
        notes.append(f"position embedding {_grid(old)} interpolated to {_grid(new)}")
    for first in (f"{module}.weight" for module in _modules(cfg.get("first_conv"))):
        new, old = own.get(first), weights.get(first)
        if new is not None and old is not None and _without_inputs(new) == _without_inputs(old):
            inputs, outputs = old.shape[1], new.shape[1]
            if inputs != outputs:
                weights[first] = adapt_input_conv(outputs, old, base_chans=inputs)
                notes.append(f"{first} from {inputs} to {amount(outputs, 'channel')}")
    heads = tuple(f"{module}." for module in _modules(cfg.get("classifier")))
    for name in [name for name in (*own, *weights) if name.startswith(heads) and not same_classes]:
        if name not in own:
            del weights[name]
            notes.append(f"{name} left out")
        elif same_classes is False or (name in weights and own[name].shape != weights[name].shape):
            weights[name] = own[name]
            notes.append(f"{name} {_size(own[name])} newly initialised")
    return weights, tuple(dict.fromkeys(notes))


def _load(
    path: str | Path,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    requested: Mapping[str, Any] | None = None,
    partial: bool = False,
) -> Checkpoint:
    path, values = read_description(path)
    saved, image = _settings(path, values)
    name, network = read_network(path, values)
    known = own_fields(name) | STANDARD
    changes = dict(requested or {})
    if unknown := sorted(set(changes) - known):
        raise ValueError(f"{name} has no {', '.join(unknown)}: use one of {', '.join(sorted(known))}")
    names = _names(saved, num_classes, classes)
    image = replace(image, size=changes.get("img_size", image.size))
    if not own_fields(name):
        changes.pop("img_size", None)  # create_network passes it to networks that need it
    model: Any = create_network(name, len(names), image.size, network | changes)
    weights, adapted = adapt(model, read_weights(path), names == saved)
    report = replace(take_weights(model, weights, path, partial=partial), adapted=adapted)
    if report or adapted:
        _log.warning("weights from %s: %s", path, report)
    model.load_report = report
    model.pretrained_cfg = {**model.pretrained_cfg, **_described(model, image, names)}
    return Checkpoint(model.eval(), str(values["task"]), name, names, image)


def _settings(path: Path, values: Mapping[str, Any]) -> tuple[list[str], ImageConfig]:
    """Return the classes and image settings of a classifier."""
    if values["task"] != "classification":
        raise ValueError(
            f"{path} is a checkpoint of the task {values['task']!r}: use a checkpoint of a classifier, or "
            "sola_vision.tasks.segmenter.load_segmenter or sola_vision.tasks.detector.load_detector"
        )
    try:
        return [str(label) for label in values["classes"]], read_settings(ImageConfig, values["image"])
    except (AttributeError, TypeError, ValueError) as error:
        raise foreign_metadata(path, error) from None


def _names(saved: list[str], num_classes: int | None, classes: Sequence[str] | None) -> list[str]:
    if classes is not None:
        if num_classes not in (None, len(classes)):
            given = amount(len(classes), "class", "classes")
            raise ValueError(f"num_classes={num_classes} does not match {given}: use one of the two")
        if isinstance(classes, str):
            raise ValueError(f"classes={classes!r} must be a list of names")
        return [str(label) for label in classes]
    if num_classes is not None and num_classes < 0:
        raise ValueError(f"num_classes={num_classes} must not be negative; use 0 for no head")
    return saved if num_classes in (None, len(saved)) else [str(index) for index in range(num_classes)]


def _stored_classes(path: Path) -> list[str] | None:
    """Return the classes stored with a file, or None for bare weights."""
    try:
        classes = read_description(path)[1]["classes"]
    except ValueError:
        return None
    return classes if isinstance(classes, list) else None


def _identity(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return the network's name in timm's registry and its pretrained_cfg."""
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    name = cfg.get("architecture")
    if name is None and isinstance(model, SolaVision | VisionRwkv):
        # built without a name: any name of the family works, because every field is stored
        name = "sola_tiny" if isinstance(model, SolaVision) else "vrwkv_tiny"
        cfg = timm.get_pretrained_cfg(name).to_dict()
    if name is None or not timm.is_model(name):
        raise ValueError(
            f"{type(model).__name__} is not in timm's registry, so load could not build it: save its state_dict"
        )
    if own_fields(name) and not isinstance(model, SolaVision | VisionRwkv):
        raise ValueError(
            f"{type(model).__name__} wraps {name} and names its tensors differently: save the network inside (of PEFT, "
            "what merge_and_unload() returns), or only the weights, with safetensors.torch.save_model"
        )
    strange = sorted(set(getattr(model, "_model_args", {})) - STANDARD - {"drop_rate"}) if not own_fields(name) else []
    if strange:
        raise ValueError(f"{name} was built with {', '.join(strange)}: save it with timm's save_for_hf")
    return name, cfg


def _check_tensors(model: nn.Module) -> None:
    """Raise ValueError if a network's state has anything but tensors, as torch's quantised modules have."""
    others = [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"{others[0]} is not a tensor: a quantised network cannot be saved; save the one that it was made from, "
            "and quantise what sola_vision.load returns"
        )


def _check_whole(model: nn.Module) -> None:
    """Raise ValueError if a network of this package no longer has the modules that its config builds."""
    if not isinstance(model, SolaVision | VisionRwkv):
        return
    kind: Any = type(model)
    networks = (model, kind(model.config, device="meta"))
    shapes, settings = ([part(network) for network in networks] for part in (_shapes, _settings_of_modules))
    differing = [name for name in {**shapes[0], **shapes[1]} if shapes[0].get(name) != shapes[1].get(name)]
    # a module that only one of the two has shows in its tensors
    differing += [name for name in settings[0].keys() & settings[1].keys() if settings[0][name] != settings[1][name]]
    if differing:
        raise ValueError(
            f"{amount(len(differing), 'part does', 'parts do')} not match the network's config ({min(differing)} "
            "first): it was pruned or changed; save only its weights, with safetensors.torch.save_model"
        )


def _shapes(network: nn.Module) -> dict[str, Any]:
    """The shapes of a network's tensors, without the head's."""
    return {name: tensor.shape for name, tensor in network.state_dict().items() if not name.startswith("head.")}


def _settings_of_modules(network: nn.Module) -> dict[str, str]:
    """What the modules with parameters print of themselves, such as a norm's eps, without the head's."""
    modules = network.named_modules()
    return {name: part.extra_repr() for name, part in modules if part._parameters and not name.startswith("head.")}


def _image(model: nn.Module, cfg: Mapping[str, Any]) -> ImageConfig:
    """Return timm's image settings; the size of a network that was not loaded is the one it was built with."""
    size = cfg["input_size"][-1]
    if not hasattr(model, "load_report"):
        size = network_arguments(model).get("img_size", size)
        size = size if isinstance(size, int) else size[-1]
    settings = {key: cfg[key] for key in ("mean", "std", "interpolation", "crop_pct")}
    return read_settings(ImageConfig, {"size": size, **settings})


def _described(model: nn.Module, image: ImageConfig, names: list[str]) -> dict[str, Any]:
    """Return classes and image settings under timm's names."""
    channels = getattr(model, "in_chans", 3)
    return {
        "input_size": (channels, image.size, image.size),
        "mean": _of_channels(image.mean, channels),
        "std": _of_channels(image.std, channels),
        "interpolation": image.interpolation,
        "crop_pct": image.evaluated_part,
        "num_classes": len(names),
        "label_names": names,
    }


def _of_channels(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A value for each channel: the values, or their mean if they are of other channels, as in timm."""
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _modules(names: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return timm's module names, which may be one, several (two heads, or streams of the stem) or none, as a tuple."""
    return (names,) if isinstance(names, str) else tuple(names or ())


def _without_inputs(weight: Tensor) -> tuple[int, ...]:
    """Return the shape of a convolution's weight without its input channels."""
    return (*weight.shape[:1], *weight.shape[2:])


def _grid(weight: Tensor) -> str:
    return _size(weight[0, 0])


def _size(x: Tensor) -> str:
    return "x".join(map(str, x.shape))
