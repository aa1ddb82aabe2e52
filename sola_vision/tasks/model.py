# SPDX-License-Identifier: Apache-2.0
"""Which network a run trains, and how its checkpoint says so: a name of timm's registry and what differs from it.

A checkpoint is a safetensors file whose metadata holds the network, the classes and the image settings as JSON, so that
`load_checkpoint` needs nothing but the file.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import timm
from torch import nn

from sola_vision.config import SolaConfig
from sola_vision.engine import LoadReport, load_weights, read_metadata
from sola_vision.engine.checkpoint import _read_weights as read_weights


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
    changes: dict[str, Any] = {
        field.name: getattr(config, field.name)
        for field in fields(config)
        if field.name != "name" and getattr(config, field.name) is not None
    }
    if config.name.startswith("sola_"):
        changes["img_size"] = image_size
    elif unknown := sorted(set(changes) - {"drop_path_rate"}):
        raise ValueError(f"{config.name} has no {', '.join(unknown)}: these belong to the sola_* networks")
    return timm.create_model(config.name, num_classes=num_classes, **changes)


def metadata(task: str, model: ModelConfig, image: Any, classes: list[str], source: nn.Module) -> dict[str, str]:
    """What a checkpoint carries beside its weights; `source` is the network as it was built."""
    sola = getattr(source, "config", None)
    network = {"name": model.name} | (asdict(sola) if isinstance(sola, SolaConfig) else {})
    values = {"task": task, "model": network, "image": asdict(image), "classes": classes}
    return {"format": "pt"} | {name: json.dumps(value) for name, value in values.items()}


@dataclass(frozen=True)
class Checkpoint:
    """A trained network and what its file says about it."""

    model: nn.Module
    task: str
    name: str
    classes: list[str]
    image: dict[str, Any]


def load_checkpoint(path: str | Path) -> Checkpoint:
    """A checkpoint of ours, or a run's folder (its best weights), ready for evaluation.

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
    values = {name: json.loads(stored[name]) for name in ("task", "model", "image", "classes")}
    network = values["model"]
    name = network.pop("name")
    # a network of timm's keeps its own settings; a sola network is stored whole
    network["num_classes"] = len(values["classes"])
    network.pop("drop_path_rate", None)
    model = timm.create_model(name, **network)
    load_weights(model, path)
    return Checkpoint(model.eval(), values["task"], name, values["classes"], values["image"])


def initialise(model: nn.Module, path: str | Path) -> str:
    """Start from a checkpoint's weights; returns what happened, in one line.

    The head stays fresh where the number of classes differs, a position embedding of another size is interpolated;
    anything else that does not fit is a ValueError.
    """
    path = Path(path)
    stored = read_weights(path / "best.safetensors" if path.is_dir() else path)
    own = model.state_dict()
    changed = []
    for name in [n for n in stored if n in own and stored[n].shape != own[n].shape]:
        if name == "position.weight":
            size = (own[name].shape[-2], own[name].shape[-1])
            stored[name] = nn.functional.interpolate(stored[name].float(), size, mode="bicubic").to(own[name].dtype)
            changed.append("position embedding interpolated")
        elif name.startswith("head.fc."):
            stored[name] = own[name]
            changed.append(f"{name} {list(own[name].shape)} fresh")
    result = LoadReport(
        missing=tuple(n for n in own if n not in stored),
        unexpected=tuple(n for n in stored if n not in own),
        resized=tuple(n for n in stored if n in own and stored[n].shape != own[n].shape),
    )
    if result:
        raise ValueError(
            f"{path} does not fit {type(model).__name__}: {result}; start from a checkpoint of the same network"
        )
    model.load_state_dict(stored)
    return f"weights from {path}" + (f" ({', '.join(changed)})" if changed else "")
