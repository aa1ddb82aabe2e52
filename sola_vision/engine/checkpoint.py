# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: the resumable state in `last/`, the best weights, and weights written by other programs.

Every file written here is one safetensors file with its bookkeeping as JSON in the header, so nothing has to be
unpickled, and the new file replaces the old one by a single rename, so a complete file exists at all times. Sharded
tensors are gathered one by one, so a run may resume with another number of processes. (torch's distributed
checkpoints consist of many files, which no single rename can replace, and their index is a pickle.)
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

from ..wording import amount
from .distributed import on_main

STATE = Path("last") / "state.safetensors"
BEST = Path("best.safetensors")


@dataclass(frozen=True)
class LoadReport:
    """The keys that did not match when weights were loaded; false if all did. `adapted` lists what was converted."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()

    @classmethod
    def of(cls, own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> "LoadReport":
        """Compare the tensors of a network (`own`) with stored ones by name and shape."""
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
    """The bookkeeping saved in addition to weights and optimiser: position, losses, metrics, skipped images. JSON."""

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
    images: dict[str, int] = field(default_factory=dict)  # in each set; older states lack this and `metadata`
    metadata: dict[str, str] = field(default_factory=dict)  # of the weights


def load_weights(model: nn.Module, path: str | Path, *, partial: bool = False) -> LoadReport:
    """Load a safetensors file (or a .pt/.pth that holds only tensors) into `model` and return a report.

    Raise ValueError, and load nothing, if keys are missing, unexpected or of another shape. With `partial` load the
    keys that match; the report lists the others.
    """
    return take_weights(model, read_weights(Path(path)), path, partial=partial)


def take_weights(
    model: nn.Module, stored: Mapping[str, Tensor], source: str | Path, *, partial: bool = False
) -> LoadReport:
    """As `load_weights`, for tensors that have been read already; `source` names their origin in errors."""
    own = model.state_dict()
    report = LoadReport.of(own, stored)
    if report and not partial:
        raise ValueError(f"{source} does not fit {type(model).__name__}: {report}; use a partial load to load the rest")
    with torch.no_grad():
        for key, value in own.items():
            if key in stored and stored[key].shape == value.shape:
                value.copy_(_placed_like(value, stored[key]))
    return report


def read_metadata(path: str | Path) -> dict[str, str]:
    """Return the metadata strings in the header of a safetensors file."""
    with _open(Path(path)) as file:
        return dict(file.metadata() or {})


def save_weights(path: Path, model: nn.Module, metadata: Mapping[str, str] | None = None) -> None:
    """Write the full weights of `model` to one file, atomically. Collective: every process must call it."""
    tensors = _gathered("", model.state_dict())
    on_main(lambda: write_atomically(path, tensors, metadata or {}))


def save_state(
    folder: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, progress: Progress
) -> None:
    """Write modules, optimiser and `progress` as the folder's resumable state. Collective, as `save_weights`."""
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
    for index, group in enumerate(optimizer.param_groups):  # lamb keeps its step counter there, as a tensor
        tensors |= _gathered(f"group/{index}/", {k: v for k, v in group.items() if isinstance(v, Tensor)})
    header = {"progress": json.dumps(asdict(progress)), "optimizer": json.dumps({"state": scalars, "groups": groups})}
    on_main(lambda: write_atomically(folder / STATE, tensors, header))


def load_progress(folder: Path) -> Progress | None:
    """Return the `Progress` of the folder's resumable state, or None if no state has been saved."""
    path = folder / STATE
    if not path.exists():
        return None
    try:
        return Progress(**json.loads(read_metadata(path)["progress"]))
    except (KeyError, TypeError):
        raise ValueError(f"{path} was not written by this version: resume with the version that wrote it") from None


def load_state(folder: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Load what `save_state` wrote. After an error the modules may be partly loaded, so the run must not continue.

    Only the optimiser's counters are restored from the saved parameter groups; their settings stay those of
    `optimizer`.
    """
    path = folder / STATE
    with _open(path) as file:
        if "optimizer" not in (metadata := file.metadata() or {}):
            raise ValueError(f"{path} holds no optimiser state and is damaged: start again in another folder")
        header = json.loads(metadata["optimizer"])
        saved = _tensors(file)
    with torch.no_grad():
        for prefix, module in modules.items():
            own = {f"{prefix}/{key}": value for key, value in module.state_dict().items()}
            differing = [key for key in own if key not in saved or saved[key].shape != own[key].shape]
            differing += [key for key in saved if key.startswith(f"{prefix}/") and key not in own]
            if differing:
                raise ValueError(
                    f"{path} belongs to another model: {amount(len(differing), 'key differs', 'keys differ')} "
                    f"({', '.join(differing[:3])}); "
                    "resume with the configuration that the run was started with"
                )
            for key, value in own.items():
                value.copy_(_placed_like(value, saved[key]))
    names = _parameter_names(next(iter(modules.values())), optimizer)
    parameters = {name: parameter for parameter, name in names.items()}
    state: dict[Tensor, dict[str, Any]] = {
        parameters[name]: dict(values) for name, values in header["state"].items() if name in parameters
    }
    for key, mapped in saved.items():
        prefix, _, rest = key.partition("/")
        name, _, entry = rest.rpartition("/")
        if prefix not in ("optimizer", "group"):
            continue
        # the optimiser keeps the tensors it is given; as copies they do not keep the file mapped into memory: Windows
        # refuses to replace a mapped file, as the next save does
        if prefix == "optimizer" and name in parameters:
            parameter = parameters[name]
            same = mapped.shape == parameter.shape
            # fused optimisers take a parameter and its state for numbers in the same order in memory
            like = parameter if same and not isinstance(parameter, DTensor) else mapped
            value = torch.empty_like(like, dtype=mapped.dtype, device=mapped.device).copy_(mapped)
            state[parameter][entry] = _placed_like(parameter, value) if same else value
        elif prefix == "group":
            header["groups"][int(name)][entry] = mapped.clone()
    # load_state_dict puts the step counter on the device that each optimiser expects
    current = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if len(header["groups"]) != len(current["param_groups"]):
        raise ValueError(
            f"{path} has {amount(len(header['groups']), 'parameter group')} instead of {len(current['param_groups'])}: "
            "resume with the weight_decay and layer_decay that the run was started with"
        )
    for group, values in zip(current["param_groups"], header["groups"], strict=True):
        group.update({key: value for key, value in values.items() if key not in group})
    current["state"] = {index: state[parameter] for index, parameter in enumerate(order) if parameter in state}
    optimizer.load_state_dict(current)


def write_atomically(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write to a temporary file, flush it to disk and rename it over `path`: a complete file exists at all times."""
    # in a folder, because safetensors first writes to a file with a random name, which a kill would leave there
    staging = path.parent / ".new"
    temporary = staging / path.name
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # follows the user's umask; safetensors would deny others read access
        save_file(tensors, temporary, metadata=dict(metadata))
        _sort_metadata(temporary)
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, path)
        _flush(path.parent)
        staging.rmdir()
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        kept = "the previous one is unchanged" if path.exists() else "no previous one exists"
        match = re.search(r"(?:os error|code:) (\d+)", str(error))  # safetensors has no errno attribute
        number = getattr(error, "errno", None) or (int(match.group(1)) if match else errno.EIO)
        raise OSError(number, f"cannot write a checkpoint ({error}; {kept}); make room and resume", str(path)) from None


def _sort_metadata(path: Path) -> None:
    """Order the metadata of a file, which safetensors writes in random order, so that equal runs write equal files."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        if "__metadata__" in header:
            header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= size:  # the header is padded with spaces
            file.seek(8)
            file.write(text.ljust(size))


def _flush(path: Path) -> None:
    """Flush a file, or a folder's list of entries, to disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    # Windows flushes only files opened for writing; other systems cannot open a folder for writing
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # unsupported by some network drives
            raise
    finally:
        os.close(handle)


def _gathered(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return CPU copies of the full tensors on the first process, which writes them; an empty dict on the others."""
    main = not dist.is_initialized() or dist.get_rank() == 0
    result = {}
    for key, value in tensors.items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if main:
            result[prefix + key] = full.detach().to("cpu", copy=True).contiguous()
    return result


def _placed_like(own: Tensor, value: Tensor) -> Tensor:
    """Return `value`, a full tensor equal on every process, on the device of `own` and sharded in the same way."""
    if not isinstance(own, DTensor):
        return value.to(own.device)
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[Tensor, str]:
    trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    return {parameter: name for name, parameter in model.named_parameters() if id(parameter) in trained}


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors or torch.save file by name.

    A torch.save file may hold a state_dict or a checkpoint of timm's training, where the moving average is preferred.
    Files that contain code are refused with a ValueError.
    """
    if not _is_pickle(path):
        with _open(path) as file:
            return _tensors(file)
    try:
        with torch.serialization.safe_globals([Namespace]):  # the options of timm's training
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds code or objects besides tensors (or is damaged) and is not opened: save a state_dict"
        ) from None
    except Exception:  # a damaged pickle may raise anything
        raise ValueError(f"{path} is not a complete torch.save file: download or copy it again") from None
    for wrapper in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state_dict (a dict of tensors by name): save model.state_dict()")
    return clean_state_dict(content)  # without the prefixes of DDP and torch.compile


def _is_pickle(path: Path) -> bool:
    """True if the content or suffix is that of a torch.save file; the suffix varies (`model_best.pth.tar`)."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(9)
    safetensors = head[8:] == b"{"  # follows the header's length, 8 bytes of any value
    return not safetensors and (path.suffix in (".pt", ".pth", ".bin") or head.startswith((b"PK", b"\x80")))


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the path of a weights file")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}): download or write it again") from None


def _tensors(file: Any) -> dict[str, Tensor]:
    names = file.keys()  # not a mapping: it cannot be iterated itself
    return {name: file.get_tensor(name) for name in names}


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"
