# SPDX-License-Identifier: Apache-2.0
"""The network of a run and its description in a checkpoint: a name in timm's registry and the arguments that differ.

A checkpoint is a safetensors file whose metadata holds the network, the classes and the image settings as JSON, so that
loading it needs only the file. Files of other programs are described in the same format (`foreign.py`).
"""

import json
import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import timm
from torch import nn

from sola_vision.config import SolaConfig
from sola_vision.data import ImageConfig
from sola_vision.engine import read_metadata
from sola_vision.engine.checkpoint import STATE
from sola_vision.tasks import foreign
from sola_vision.vrwkv import VrwkvConfig
from sola_vision.wording import amount

Settings = TypeVar("Settings")

# file names in a folder, in order of preference: a run's; save_pretrained's and timm's; timm's default
FILES = ("best.safetensors", "model.safetensors", "pytorch_model.bin")
# arguments common to all networks
STANDARD = {"in_chans", "num_classes", "img_size", "drop_path_rate", "global_pool"}


@dataclass(kw_only=True)
class ModelConfig:
    """A network by name, sola_* or any other in timm, with the fields of SolaConfig that a run may change.

    Args:
        name: sola_nano, sola_tiny, sola_small, sola_base, or another name in timm's registry.
        schedule: layers of every stage, such as LL/LL/LLSLLS/LS; null = the network's default.
        bridges: Hidden State Bridges, such as "1.2>3.3 2.2>3.6", "paper" for Table 7's or "" for none.
        dims: channels of each stage; null = the network's default.
        patch_size: side of a stem patch in pixels; null = the network's default (4).
        head_dim: channels of an attention head; null = the network's default (32).
        token_shift: mix neighbouring tokens in linear layers; null = the network's default (true).
        drop_path_rate: stochastic depth rate of the last layer; null = the network's default.
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
                f"unknown model name {self.name!r}: use sola_nano, sola_tiny, sola_small, sola_base or a timm name"
            )

    @classmethod
    def of(cls, config: SolaConfig) -> "ModelConfig":
        """Return the network of `config`, whose image size, channels and classes follow from the data of a run."""
        # any name of the family: every field that distinguishes them is given
        return cls(
            name="sola_tiny",
            **{field.name: getattr(config, field.name) for field in fields(cls) if field.name != "name"},
        )


def build_model(config: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """Return a newly initialised network with a head for `num_classes` and a position grid for `image_size`."""
    return create_network(config.name, num_classes, image_size, network_changes(config, image_size))


def network_changes(config: ModelConfig, image_size: int) -> dict[str, Any]:
    """Return the arguments of timm's create_model by which the network differs from the default of its name."""
    changes: dict[str, Any] = {
        field.name: getattr(config, field.name)
        for field in fields(ModelConfig)
        if field.name != "name" and getattr(config, field.name) is not None
    }
    known = own_fields(config.name)
    if unknown := sorted(set(changes) - (known or {"drop_path_rate"})):
        raise ValueError(f"{config.name} has no {', '.join(unknown)}: only sola_* networks have these")
    if known:
        changes["img_size"] = image_size
    return changes


def own_fields(name: str) -> set[str]:
    """Return the config fields of a network of this package, which are create_model arguments; none for others."""
    kinds = {"sola_": SolaConfig, "vrwkv_": VrwkvConfig}
    return {field.name for prefix, kind in kinds.items() if name.startswith(prefix) for field in fields(kind)}


def create_network(name: str, num_classes: int | None, image_size: int | None, changes: dict[str, Any]) -> Any:
    """Create a network of timm's registry; raise ValueError if it cannot be built.

    num_classes None keeps the default head; image_size None keeps the default size.
    """
    if image_size is not None and not own_fields(name) and takes_one_size(name):
        changes = {**changes, "img_size": image_size}
    try:
        return timm.create_model(name, **({} if num_classes is None else {"num_classes": num_classes}), **changes)
    # timm's networks reject unknown arguments with a TypeError, sizes with an assertion, and feature maps that they do
    # not have with a RuntimeError or an AttributeError
    except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
        hint = "; --model.drop_path_rate null leaves it out" if "'drop_path_rate'" in str(error) else ""
        raise ValueError(f"{name} cannot be built with {changes}: {error}{hint}") from None


def takes_one_size(name: str) -> bool:
    """True if a network of timm is built for a single image size, as its vision transformers are."""
    cfg = timm.get_pretrained_cfg(name)
    return bool(cfg and cfg.fixed_input_size)


def metadata(
    task: str, model: ModelConfig, image: Any, classes: list[str], source: nn.Module, **more: Any
) -> dict[str, str]:
    """Return a checkpoint's metadata; `source` is the network as built, `more` holds entries of the task."""
    network = {"name": model.name} | network_arguments(source)
    values = {"task": task, "model": network, "image": asdict(image), "classes": classes, **more}
    return {"format": "pt"} | {name: json.dumps(value) for name, value in values.items()}


def network_arguments(model: nn.Module) -> dict[str, Any]:
    """Return the arguments that build this network from its name in timm's registry, as far as they were recorded."""
    recorded = {key: value for key, value in getattr(model, "_model_args", {}).items() if key in STANDARD}
    config = getattr(model, "config", None)
    recorded |= asdict(config) if isinstance(config, SolaConfig | VrwkvConfig) else {}
    pool = _global_pool(model)
    return recorded if pool is None else recorded | {"global_pool": pool}


def _global_pool(model: nn.Module) -> str | None:
    """Return the current pooling, which reset_classifier may have changed, from the head or the network itself."""
    for owner in (getattr(model, "head", None), model):
        pool = getattr(owner, "global_pool", None)
        pool = getattr(pool, "pool_type", pool)
        if isinstance(pool, str):
            return pool
    return None


def weights_file(path: str | Path) -> Path:
    """Return `path` if it is a file, or the weights file in a folder of a run, of save_pretrained or of timm."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = next((path / name for name in FILES if (path / name).exists()), None)
    if found is None:
        raise FileNotFoundError(
            f"{path} holds none of {', '.join(FILES)}; a run writes the first of these after its first evaluation"
        )
    return found


def read_description(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """Return the file of a checkpoint (a file or a folder) and its description: task, model, image, classes.

    The description is the metadata of this package's files, the config.json next to timm's, or is derived from the
    weights of Vision-RWKV's. Raise FileNotFoundError or ValueError if it is missing, damaged or of another program.
    """
    path = weights_file(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such checkpoint; a run writes best.safetensors after its first evaluation")
    stored = read_metadata(path) if path.suffix == ".safetensors" else {}
    missing = [name for name in ("task", "model", "image", "classes") if name not in stored]
    if missing:
        values = foreign.describe(path)
        if values is None:
            raise ValueError(
                f"{path} has no {' and no '.join(missing)} in its metadata, so its network is unknown; "
                "load bare weights with timm.create_model(NAME, checkpoint_path=...)"
            )
        return path, values
    try:
        # "format" is written by safetensors and is not JSON
        return path, {name: json.loads(value) for name, value in stored.items() if name != "format"}
    except ValueError as error:
        raise foreign_metadata(path, error) from None


@dataclass(frozen=True)
class ClassifierDescription:
    """The network of a classifier's checkpoint: its name, number of classes, image side and other arguments.

    arguments: those by which a network of timm's registry differs from the default of its name; without the image size
        of networks that are built for the size of their images.
    """

    name: str
    num_classes: int
    image_size: int
    arguments: dict[str, Any]


def describe_classifier(path: str | Path) -> ClassifierDescription:
    """Return the network of a classifier's checkpoint, a file or the folder of a run, without reading its weights.

    Raise FileNotFoundError or ValueError if it is missing, damaged, of another task or not for RGB images.
    """
    path, values = read_description(path)
    name, arguments = read_network(path, values)
    if values["task"] != "classification":
        raise ValueError(
            f"{path} is a checkpoint for {values['task']}: use a classifier's, or the name of its backbone, {name}"
        )
    if (channels := arguments.get("in_chans", 3)) != 3:
        kind = f"images of {amount(channels, 'channel')}"
        raise ValueError(f"{path} takes {kind}: use a checkpoint for RGB images, which have 3")
    try:
        image, num_classes = read_settings(ImageConfig, values["image"]), len(values["classes"])
    except (AttributeError, TypeError, ValueError) as error:
        raise foreign_metadata(path, error) from None
    if not name.startswith("sola_"):
        arguments.pop("img_size", None)
    return ClassifierDescription(name, num_classes, image.size, arguments)


def foreign_metadata(path: Path, why: object) -> ValueError:
    """Return the error for metadata that this package did not write."""
    return ValueError(f"{path}: its metadata was not written by sola train or save_pretrained ({why}): write it again")


def read_settings(kind: type[Settings], values: dict[str, Any]) -> Settings:
    """Create a dataclass from JSON values, turning lists into tuples; TypeError or ValueError if they do not fit."""
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def read_network(path: Path, values: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the network's name and the arguments by which it differs from timm's default of that name."""
    try:
        network = dict(values["model"])
        name = network.pop("name")
    except (KeyError, TypeError, ValueError) as error:
        raise foreign_metadata(path, error) from None
    # only registered names and known fields: an untrusted file must not make timm download or open anything
    known = isinstance(name, str) and timm.is_model(name)
    strange = sorted(set(network) - own_fields(name) - STANDARD) if known else []
    if strange or not known:
        raise ValueError(f"{path} has the network {name!r} with {strange or 'no extras'}, unknown to this version")
    network.pop("num_classes", None)
    return name, network


def explain_mismatch(path: Path, model: Any) -> str | None:
    """Say why the weights of a checkpoint do not fit the network of a run, and what to do: it is of another task, or of
    another network, for which the options of `sola train` that build it are named.

    None if the checkpoint does not describe its network, or no option makes the difference.
    """
    if path.name == STATE.name:
        return "it is the state that --resume continues from: use the run's folder or its best.safetensors"
    try:
        path, values = read_description(path)
        name, stored = read_network(path, values)
    except (FileNotFoundError, ValueError):
        return None
    if values["task"] != "classification":
        return f"it is a checkpoint of the task {values['task']!r}: use a classifier's"
    own_name, own = model.pretrained_cfg["architecture"], network_arguments(model)
    # the fields that the run has set stay as they are if only the name changes
    defaults = _default_fields(own_name)
    with_name = _default_fields(name) | {key: value for key, value in own.items() if value != defaults.get(key)}
    options = [] if name == own_name else [f"--model.name {name}"]
    stored.pop("drop_path_rate", None)  # weights of any rate fit
    for field in (field.name for field in fields(ModelConfig) if field.name in stored):
        value = tuple(stored[field]) if isinstance(stored[field], list) else stored[field]
        if with_name.get(field) != value:
            text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
            options.append(f"--model.{field} {shlex.quote(text)}")
    if not options:
        return None
    described = [
        each + (f" with schedule {arguments['schedule']}" if "schedule" in arguments else "")
        for each, arguments in ((name, stored), (own_name, own))
    ]
    return f"the file is of {described[0]}, this run of {described[1]}: use {' '.join(options)}"


def _default_fields(name: str) -> dict[str, Any]:
    """Return the config of a network of this package by its name alone; empty for others."""
    return asdict(timm.create_model(name, device="meta").config) if own_fields(name) else {}
