# SPDX-License-Identifier: Apache-2.0
"""Which network a run trains, and how its checkpoint says so: a name of timm's registry and what differs from it.

A checkpoint is a safetensors file whose metadata holds the network, the classes and the image settings as JSON, so that
`load_checkpoint` needs nothing but the file.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import timm
from torch import nn

from sola_vision.config import SolaConfig
from sola_vision.data import ImageConfig
from sola_vision.engine import LoadReport, load_weights, read_metadata, read_weights

Settings = TypeVar("Settings")


@dataclass(kw_only=True)
class ModelConfig:
    """A network by name, sola_* or any other of timm's, with the fields of SolaConfig that a run may change.

    Args:
        name: sola_nano, sola_tiny, sola_small, sola_base, or another name that timm knows.
        schedule: layers of every stage, such as LL/LL/LLSLLS/LS; null = the name's own.
        bridges: Hidden State Bridges, such as "1.2>3.3 2.2>3.6", "paper" for Table 7's or "" for none.
        dims: channels of each stage; null = the name's own.
        patch_size: pixels a side of a stem patch; null = the name's own (4).
        head_dim: channels of an attention head; null = the name's own (32).
        token_shift: whether linear layers see their neighbours' tokens; null = the name's own (true).
        drop_path_rate: stochastic depth of the last layer; null = the name's own.
    """

    name: str = "sola_tiny"
    schedule: str | None = None
    bridges: str | None = None
    dims: tuple[int, ...] | None = None
    patch_size: int | None = None
    head_dim: int | None = None
    token_shift: bool | None = None
    drop_path_rate: float | None = None

    def __post_init__(self) -> None:
        if not timm.is_model(self.name):
            raise ValueError(
                f"model name {self.name!r} is unknown: sola_nano, sola_tiny, sola_small, sola_base or a timm name"
            )


def build_model(config: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """The network with fresh weights and a head for `num_classes`, its position grid laid out for `image_size`."""
    return create_network(config.name, num_classes, image_size, network_changes(config, image_size))


def network_changes(config: ModelConfig, image_size: int) -> dict[str, Any]:
    """How the network differs from the one of its name, as arguments of timm's."""
    changes: dict[str, Any] = {
        field.name: getattr(config, field.name)
        for field in fields(ModelConfig)
        if field.name != "name" and getattr(config, field.name) is not None
    }
    if config.name.startswith("sola_"):
        changes["img_size"] = image_size
    elif unknown := sorted(set(changes) - {"drop_path_rate"}):
        raise ValueError(f"{config.name} has no {', '.join(unknown)}: these belong to the sola_* networks")
    return changes


def create_network(name: str, num_classes: int | None, image_size: int, changes: dict[str, Any]) -> Any:
    """A network of timm's registry; num_classes None: no head. What it refuses is a ValueError."""
    if not name.startswith("sola_") and takes_one_size(name):
        changes = {**changes, "img_size": image_size}
    try:
        return timm.create_model(name, **({} if num_classes is None else {"num_classes": num_classes}), **changes)
    # timm's networks refuse with a TypeError what they have no argument for, and sizes with an assertion
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be built with {changes}: {error}") from None


def takes_one_size(name: str) -> bool:
    """Whether a network of timm's is built for one size of images, as its vision transformers are."""
    cfg = timm.get_pretrained_cfg(name)
    return bool(cfg and cfg.fixed_input_size)


def metadata(
    task: str, model: ModelConfig, image: Any, classes: list[str], source: nn.Module, **more: Any
) -> dict[str, str]:
    """What a checkpoint carries beside its weights; `source` is the network as it was built, `more` is the task's."""
    sola = getattr(source, "config", None)
    network = {"name": model.name} | (asdict(sola) if isinstance(sola, SolaConfig) else {})
    values = {"task": task, "model": network, "image": asdict(image), "classes": classes, **more}
    return {"format": "pt"} | {name: json.dumps(value) for name, value in values.items()}


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and what its file says about it."""

    model: nn.Module
    task: str
    name: str
    classes: list[str]
    image: ImageConfig


def read_description(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file of a checkpoint of ours (or of a run's folder: its best weights), and what its metadata says.

    Raises FileNotFoundError or ValueError with one line if it is missing, damaged or of another program.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "best.safetensors"
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such checkpoint; a run's folder holds best.safetensors after its first evaluation"
        )
    stored = read_metadata(path)
    missing = [name for name in ("task", "model", "image", "classes") if name not in stored]
    if missing:
        raise ValueError(
            f"{path} has no {' and no '.join(missing)} in its metadata: it is not a checkpoint of sola train; "
            "load bare weights with sola_vision.engine.load_weights"
        )
    try:
        # "format" is safetensors' own and no JSON
        return path, {name: json.loads(value) for name, value in stored.items() if name != "format"}
    except ValueError as error:
        raise foreign_metadata(path, error) from None


def foreign_metadata(path: Path, why: object) -> ValueError:
    return ValueError(f"{path}: its metadata is not what sola train writes ({why}): train again")


def read_settings(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """A dataclass from JSON, which has no tuples; TypeError or ValueError where it does not fit."""
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def read_network(path: Path, values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The network's name and how it differs from the one that timm makes by that name."""
    try:
        network = dict(values["model"])
        name = network.pop("name")
    except (KeyError, TypeError, ValueError) as error:
        raise foreign_metadata(path, error) from None
    # only names of the registry and fields of the network: a file from elsewhere must not make timm fetch or open more
    foreign = sorted(set(network) - {field.name for field in fields(SolaConfig)})
    if foreign or not isinstance(name, str) or not timm.is_model(name):
        raise ValueError(f"{path} is of {name!r} with {foreign or 'no extras'}, which this version does not know")
    network.pop("num_classes", None)
    network.pop("drop_path_rate", None)
    return name, network


def load_checkpoint(path: str | Path) -> Checkpoint:
    """A classifier of ours, or a run's folder (its best weights), ready for evaluation.

    Raises FileNotFoundError or ValueError with one line if it is missing, damaged or of another program or task.
    """
    path, values = read_description(path)
    if values["task"] != "classification":
        raise ValueError(f"{path} is of the task {values['task']!r}: a checkpoint of a classifier is needed here")
    try:
        image = read_settings(ImageConfig, values["image"])
        classes = [str(label) for label in values["classes"]]
    except (AttributeError, TypeError, ValueError) as error:
        raise foreign_metadata(path, error) from None
    name, network = read_network(path, values)
    model = create_network(name, len(classes), image.size, network)
    load_weights(model, path)
    return Checkpoint(model.eval(), str(values["task"]), name, classes, image)


def initialise(model: nn.Module, path: str | Path, classes: Sequence[str] | None = None) -> str:
    """Start from a checkpoint's weights; returns what happened, in one line.

    The head stays fresh where the number of classes differs, or their names if `classes` tells them; a position
    embedding of another size is interpolated; anything else that does not fit is a ValueError.
    """
    path = Path(path)
    path = path / "best.safetensors" if path.is_dir() else path
    stored = read_weights(path)
    own = model.state_dict()
    head = f"{getattr(model, 'pretrained_cfg', {}).get('classifier')}."
    theirs = _classes(path)
    other_classes = classes is not None and theirs is not None and list(classes) != theirs
    changed = []
    for name in [n for n in stored if n in own]:
        same = stored[name].shape == own[name].shape
        if name == "position.weight" and not same:
            size = (own[name].shape[-2], own[name].shape[-1])
            if stored[name].shape[:-2] != own[name].shape[:-2]:
                continue
            stored[name] = nn.functional.interpolate(stored[name].float(), size, mode="bicubic").to(own[name].dtype)
            changed.append("position embedding interpolated")
        elif name.startswith(head) and (other_classes or not same):
            stored[name] = own[name]
            changed.append(f"{name} {list(own[name].shape)} fresh")
    result = LoadReport.of(own, stored)
    if result:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: {result}; start from a checkpoint of the same network"
        )
    model.load_state_dict(stored)
    return f"weights from {path}" + (f" ({', '.join(changed)})" if changed else "")


def _classes(path: Path) -> list[str] | None:
    """The classes that a checkpoint of ours names; bare weights name none."""
    if path.suffix != ".safetensors":
        return None
    classes = json.loads(read_metadata(path).get("classes", "null"))
    return classes if isinstance(classes, list) else None
