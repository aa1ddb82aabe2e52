# SPDX-License-Identifier: Apache-2.0
"""Files of weights: the resumable state in `last/`, the best weights, and weights from elsewhere.

Everything written is one safetensors file with its bookkeeping as JSON in the header, so there is nothing to
unpickle, and one rename replaces the old file by the new one: whatever happens, a complete one is there. Sharded
tensors are gathered one by one, so a run may go on with another number of processes. (torch's distributed
checkpoints are many files, which no rename replaces, and their index is a pickle.)
"""

import errno
import json
import os
import pickle
import re
import shutil
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import clean_state_dict
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .distributed import on_main

STATE = Path("last") / "state.safetensors"
BEST = Path("best.safetensors")


@dataclass(frozen=True)
class LoadReport:
    """What did not match when weights were loaded, by name; false when all did. `adapted`: what was made to match."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()

    @classmethod
    def of(cls, own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> "LoadReport":
        """A network's own tensors beside stored ones."""
        return cls(
            missing=tuple(name for name in own if name not in stored),
            unexpected=tuple(name for name in stored if name not in own),
            resized=tuple(
                f"{name} {_shape(stored[name])} instead of {_shape(own[name])}"
                for name in own
                if name in stored and stored[name].shape != own[name].shape
            ),
        )

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.resized)

    def __str__(self) -> str:
        parts = []
        for name in ("missing", "unexpected", "resized"):
            keys = getattr(self, name)
            if keys:
                more = ", ..." if len(keys) > 3 else ""
                parts.append(f"{len(keys)} {name} ({', '.join(keys[:3])}{more})")
        parts += self.adapted
        return ", ".join(parts) or "every key matches"


@dataclass
class Progress:
    """What is saved beside weights and optimiser: where the run is and what it has seen. Plain JSON."""

    step: int = 0
    evaluated: int = 0  # step of the last evaluation
    latest: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)  # of the losses since the last training record
    summed: int = 0
    seconds: float = 0.0
    metrics_bytes: int = 0
    skipped: dict[str, dict[str, str]] = field(default_factory=dict)
    scaler: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    images: dict[str, int] = field(default_factory=dict)  # in each set; older states do not say, nor the metadata
    metadata: dict[str, str] = field(default_factory=dict)  # of the weights


def load_weights(model: nn.Module, path: str | Path, *, partial: bool = False) -> LoadReport:
    """Load a safetensors file (or a .pt/.pth with nothing but tensors in it) into `model`.

    Keys that are missing, unexpected or of another shape are an error and then nothing is loaded, unless
    `partial` asks for what fits; the report lists them.
    """
    return take_weights(model, read_weights(Path(path)), path, partial=partial)


def take_weights(
    model: nn.Module, theirs: Mapping[str, Tensor], source: str | Path, *, partial: bool = False
) -> LoadReport:
    """`load_weights` of tensors that are read already; `source` is where they are from."""
    own = model.state_dict()
    report = LoadReport.of(own, theirs)
    if report and not partial:
        raise ValueError(
            f"{source} does not fit {type(model).__name__}: {report}; ask for a partial load to take the rest"
        )
    with torch.no_grad():
        for key, value in own.items():
            if key in theirs and theirs[key].shape == value.shape:
                value.copy_(_placed_like(value, theirs[key]))
    return report


def read_metadata(path: str | Path) -> dict[str, str]:
    """The strings in a safetensors file's header."""
    with _open(Path(path)) as file:
        return dict(file.metadata() or {})


def save_weights(path: Path, model: nn.Module, metadata: Mapping[str, str] | None = None) -> None:
    """All processes together: the whole weights of `model` into one file, replaced at once or not at all."""
    tensors = _gathered("", model.state_dict())
    on_main(lambda: write_atomically(path, tensors, metadata or {}))


def save_state(
    folder: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """All processes together: modules, optimiser and `progress` as the folder's resumable state."""
    tensors: dict[str, Tensor] = {}
    for prefix, module in modules.items():
        tensors |= _gathered(f"{prefix}/", module.state_dict())
    names = _parameter_names(next(iter(modules.values())), optimizer)
    scalars: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        name = names[parameter]
        tensors |= _gathered(f"optimizer/{name}/", {k: v for k, v in state.items() if isinstance(v, Tensor)})
        scalars[name] = {k: v for k, v in state.items() if isinstance(v, bool | int | float)}
    groups = [{k: v for k, v in group.items() if isinstance(v, bool | int | float)} for group in optimizer.param_groups]
    for index, group in enumerate(optimizer.param_groups):  # lamb counts its steps there, in a tensor
        tensors |= _gathered(f"group/{index}/", {k: v for k, v in group.items() if isinstance(v, Tensor)})
    header = {"progress": json.dumps(asdict(progress)), "optimizer": json.dumps({"state": scalars, "groups": groups})}
    on_main(lambda: write_atomically(folder / STATE, tensors, header))


def load_progress(folder: Path, total: int | None = None, optimizer: str | None = None) -> Progress | None:
    """The `progress` of the folder's resumable state, None if there is no such state yet.

    A state beyond the `total` steps of the run that wants to go on, or of another `optimizer`, is a ValueError.
    """
    path = folder / STATE
    if not path.exists():
        return None
    try:
        progress = Progress(**json.loads(read_metadata(path)["progress"]))
    except (KeyError, TypeError):
        raise ValueError(f"{path} is not a state that this version wrote: resume with the version that did") from None
    if total is not None and progress.step > total:
        raise ValueError(
            f"{folder} is at step {progress.step}, past the {total} steps that this run has: it was begun with more "
            "images or epochs; resume it with these, or choose another folder"
        )
    before = progress.config.get("optimizer")
    if optimizer is not None and before not in (None, optimizer):
        raise ValueError(
            f"optimizer={optimizer!r} cannot go on from the state of {before!r} in {folder}: resume with {before!r}, "
            "or start a new run from its weights"
        )
    return progress


def load_state(folder: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """The opposite of save_state; on an error the modules may be half loaded, so the run has to end.

    Of the parameter groups it takes what the optimiser counts there; their settings stay those of `optimizer`.
    """
    path = folder / STATE
    with _open(path) as file:
        if "optimizer" not in (metadata := file.metadata() or {}):
            raise ValueError(f"{path} holds no optimiser's state: it is damaged, so start again in another folder")
        header = json.loads(metadata["optimizer"])
        saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is not a mapping
    with torch.no_grad():
        for prefix, module in modules.items():
            own = {f"{prefix}/{key}": value for key, value in module.state_dict().items()}
            differing = [key for key in own if key not in saved or saved[key].shape != own[key].shape]
            differing += [key for key in saved if key.startswith(f"{prefix}/") and key not in own]
            if differing:
                raise ValueError(
                    f"{path} is of another model: {len(differing)} keys differ ({', '.join(differing[:3])}); "
                    "resume with the configuration that the run began with"
                )
            for key, value in own.items():
                value.copy_(_placed_like(value, saved[key]))
    names = _parameter_names(next(iter(modules.values())), optimizer)
    parameters = {name: parameter for parameter, name in names.items()}
    state: dict[Tensor, dict[str, Any]] = {
        parameters[name]: dict(values) for name, values in header["state"].items() if name in parameters
    }
    for key, value in saved.items():
        prefix, _, rest = key.partition("/")
        name, _, entry = rest.rpartition("/")
        if prefix == "optimizer" and name in parameters:
            parameter = parameters[name]
            same = value.shape == parameter.shape
            state[parameter][entry] = _placed_like(parameter, value) if same else value
        elif prefix == "group":
            header["groups"][int(name)][entry] = value
    # torch's own loading knows where each optimiser wants its step counter
    current = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(header["groups"]) != len(current["param_groups"]):
        raise ValueError(
            f"{path} has {len(header['groups'])} parameter groups instead of {len(current['param_groups'])}: "
            "resume with the weight_decay and layer_decay that the run began with"
        )
    for group, values in zip(current["param_groups"], header["groups"], strict=True):
        group.update({key: value for key, value in values.items() if key not in group})
    current["state"] = {index: state[parameter] for index, parameter in enumerate(order) if parameter in state}
    optimizer.load_state_dict(current)


def write_atomically(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Written beside the old file, forced to disk, then renamed over it: at every moment one of them is complete."""
    # a folder, because safetensors writes to a file of its own naming first, which a kill would leave behind
    workshop = path.parent / ".new"
    beside = workshop / path.name
    try:
        shutil.rmtree(workshop, ignore_errors=True)
        workshop.mkdir(parents=True)
        beside.touch()
        mode = beside.stat().st_mode  # what the user's umask says; safetensors would keep others from reading
        save_file(tensors, beside, metadata=dict(metadata))
        beside.chmod(mode)
        _to_disk(beside)
        os.replace(beside, path)
        _to_disk(path.parent)
        workshop.rmdir()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(workshop, ignore_errors=True)
        kept = "the previous one is untouched" if path.exists() else "there is no previous one"
        found = re.search(r"os error (\d+)", str(error))  # safetensors tells it in words only
        number = getattr(error, "errno", None) or (int(found.group(1)) if found else errno.EIO)
        raise OSError(number, f"cannot write a checkpoint ({error}; {kept}); make room and resume", str(path)) from None


def _to_disk(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    # Windows flushes only what may be written, others do not open a folder for that
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some shared folders cannot
            raise
    finally:
        os.close(handle)


def _gathered(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU of whole tensors; empty on all processes but the first, which writes them."""
    main = not dist.is_initialized() or dist.get_rank() == 0
    result = {}
    for key, value in tensors.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if main:
            result[prefix + key] = full.detach().to("cpu", copy=True).contiguous()
    return result


def _placed_like(own: Tensor, value: Tensor) -> Tensor:
    """`value`, whole and the same on every process, on the device of `own` and sharded as it is."""
    if not isinstance(own, DTensor):
        return value.to(own.device)
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    mine = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {parameter: name for name, parameter in model.named_parameters() if id(parameter) in mine}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name, of a safetensors file or of one of torch.save: a state_dict, or what timm's training leaves, the
    moving average first. Nothing with code in it is opened.
    """
    if not _is_pickle(path):
        with _open(path) as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is not a mapping
    try:
        with torch.serialization.safe_globals([Namespace]):  # the options of timm's training
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds code or objects beside tensors (or is damaged) and is not opened: save a state_dict"
        ) from None
    except Exception:  # a damaged pickle may raise anything
        raise ValueError(f"{path} is not a complete file of torch.save: fetch it again") from None
    for wrapper in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state_dict (a dict from names to tensors): save model.state_dict()")
    return clean_state_dict(content)  # without the prefixes of DDP and torch.compile


def _is_pickle(path: Path) -> bool:
    """By what it begins with: names say little (`model_best.pth.tar`)."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(9)
    safetensors = head[8:] == b"{"  # after the header's length, which may read like anything
    return not safetensors and (path.suffix in (".pt", ".pth", ".bin") or head.startswith((b"PK", b"\x80")))


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: name a file of weights")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}): fetch or write it again") from None


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
