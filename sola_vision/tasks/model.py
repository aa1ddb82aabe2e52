# SPDX-License-Identifier: Apache-2.0
"""Which network a run trains, and how its checkpoint says so: a name of timm's registry and what differs from it.

A checkpoint is a safetensors file whose metadata holds the network, the classes and the image settings as JSON, so that
loading it needs nothing but the file. What other programs write is described in the same words (`foreign.py`).
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import timm
from torch import nn

from sola_vision.config import SolaConfig
from sola_vision.engine import read_metadata
from sola_vision.tasks import foreign
from sola_vision.vrwkv import VrwkvConfig

Settings = TypeVar("Settings")

# in a folder, in this order: a run's, save_pretrained's and timm's, and what timm writes by default
FILES = ("best.safetensors", "model.safetensors", "pytorch_model.bin")
# arguments that every network may have
STANDARD = {"in_chans", "num_classes", "img_size", "drop_path_rate", "global_pool"}


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
    known = own_fields(config.name)
    if unknown := sorted(set(changes) - (known or {"drop_path_rate"})):
        raise ValueError(f"{config.name} has no {', '.join(unknown)}: these belong to the sola_* networks")
    if known:
        changes["img_size"] = image_size
    return changes


def own_fields(name: str) -> set[str]:
    """The fields of a network of ours, which are arguments of its name in timm's registry; none for any other."""
    kinds = {"sola_": SolaConfig, "vrwkv_": VrwkvConfig}
    return {field.name for prefix, kind in kinds.items() if name.startswith(prefix) for field in fields(kind)}


def create_network(name: str, num_classes: int | None, image_size: int | None, changes: dict[str, Any]) -> Any:
    """A network of timm's registry; num_classes None: no head, image_size None: the size that its name is made for.

    What it refuses is a ValueError.
    """
    if image_size is not None and not own_fields(name) and takes_one_size(name):
        changes = {**changes, "img_size": image_size}
    try:
        return timm.create_model(name, **({} if num_classes is None else {"num_classes": num_classes}), **changes)
    # timm's networks refuse what they have no argument for with a TypeError, sizes with an assertion, and feature maps
    # that they have not with a RuntimeError or an AttributeError
    except (AssertionError, AttributeError, RuntimeError, TypeError) as error:
        hint = "; --model.drop_path_rate null leaves it out" if "'drop_path_rate'" in str(error) else ""
        raise ValueError(f"{name} cannot be built with {changes}: {error}{hint}") from None


def takes_one_size(name: str) -> bool:
    """Whether a network of timm's is built for one size of images, as its vision transformers are."""
    cfg = timm.get_pretrained_cfg(name)
    return bool(cfg and cfg.fixed_input_size)


def metadata(
    task: str, model: ModelConfig, image: Any, classes: list[str], source: nn.Module, **more: Any
) -> dict[str, str]:
    """What a checkpoint carries beside its weights; `source` is the network as it was built, `more` is the task's."""
    network = {"name": model.name} | network_arguments(source)
    values = {"task": task, "model": network, "image": asdict(image), "classes": classes, **more}
    return {"format": "pt"} | {name: json.dumps(value) for name, value in values.items()}


def network_arguments(model: nn.Module) -> dict[str, Any]:
    """What makes this network from the name it has in timm's registry, as far as we or timm noted it."""
    noted = {key: value for key, value in getattr(model, "_model_args", {}).items() if key in STANDARD}
    config = getattr(model, "config", None)
    noted |= asdict(config) if isinstance(config, SolaConfig | VrwkvConfig) else {}
    pool = _global_pool(model)
    return noted if pool is None else noted | {"global_pool": pool}


def _global_pool(model: nn.Module) -> str | None:
    """How it pools now, which reset_classifier may have changed: by its head, as timm's heads say it, or by itself."""
    for owner in (getattr(model, "head", None), model):
        pool = getattr(owner, "global_pool", None)
        pool = getattr(pool, "pool_type", pool)
        if isinstance(pool, str):
            return pool
    return None


def weights_file(path: str | Path) -> Path:
    """A file of weights, or the one in a folder: a run's, save_pretrained's, or one that timm wrote."""
    path = Path(path)
    if not path.is_dir():
        return path
    found = next((path / name for name in FILES if (path / name).exists()), None)
    if found is None:
        raise FileNotFoundError(
            f"{path} holds none of {', '.join(FILES)}; a run's folder holds the first after its first evaluation"
        )
    return found


def read_description(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The file of a checkpoint (or in a folder of one), and what is known about it: task, model, image, classes.

    Of ours its metadata says so, of timm's the config.json beside it, of Vision-RWKV's its weights.
    Raises FileNotFoundError or ValueError with one line if it is missing, damaged or of another program.
    """
    path = weights_file(path)
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: no such checkpoint; a run's folder holds best.safetensors after its first evaluation"
        )
    stored = read_metadata(path) if path.suffix == ".safetensors" else {}
    missing = [name for name in ("task", "model", "image", "classes") if name not in stored]
    if missing:
        values = foreign.describe(path)
        if values is None:
            raise ValueError(
                f"{path} has no {' and no '.join(missing)} in its metadata: nothing says what network it is of; "
                "load bare weights with timm.create_model(NAME, checkpoint_path=...)"
            )
        return path, values
    try:
        # "format" is safetensors' own and no JSON
        return path, {name: json.loads(value) for name, value in stored.items() if name != "format"}
    except ValueError as error:
        raise foreign_metadata(path, error) from None


def foreign_metadata(path: Path, why: object) -> ValueError:
    return ValueError(f"{path}: its metadata is not what sola train and save_pretrained write ({why}): write it again")


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
    known = isinstance(name, str) and timm.is_model(name)
    strange = sorted(set(network) - own_fields(name) - STANDARD) if known else []
    if strange or not known:
        raise ValueError(f"{path} is of {name!r} with {strange or 'no extras'}, which this version does not know")
    network.pop("num_classes", None)
    network.pop("drop_path_rate", None)
    return name, network
