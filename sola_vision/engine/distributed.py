# SPDX-License-Identifier: Apache-2.0
"""Processes: the group that torchrun starts, what its members tell each other, and who holds which parameters.

Everything here also works in a single process without a group. Objects and tensors on the CPU travel over gloo,
tensors on a GPU over nccl.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all of the run."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def distributed(device: str = "auto") -> Iterator[World]:
    """The process group that torchrun's environment describes, or a world of one without it. May be nested."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    place = _device(device, local_rank)
    owner = "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if owner:
        # both, so that small objects do not have to pass through the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    try:
        if dist.is_initialized():
            yield World(dist.get_rank(), dist.get_world_size(), place)
        else:
            yield World(0, 1, place)
    except BaseException:
        # the others may be inside a collective: nccl would wait for them here, torchrun ends them instead
        owner = owner and place.type != "cuda"
        raise
    finally:
        if owner:
            dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r} is no device of torch: use auto, cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r} is not one that runs train on: use auto, cpu or cuda")
    if device.type == "cpu":
        return device
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"device={name!r} needs GPU {index}, but there are {torch.cuda.device_count()}: use device=cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def set_precision(device: torch.device) -> None:
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
        # trying out algorithms may choose others after resuming, and some of them add in no fixed order
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes; `tensor` itself is left as it is."""
    total = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def gather_objects(items: list[T]) -> list[T]:
    """The lists of all processes, one after the other in the order of their ranks, on every process."""
    if not dist.is_initialized():
        return list(items)
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def on_main(function: Callable[[], T]) -> T:
    """What `function` returns on the first process, or the OSError or ValueError it raises, on every process."""
    result: list[Any] = [None, None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result[0] = function()
        except (OSError, ValueError) as error:
            result[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise result[1]
    return result[0]


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for work in [dist.broadcast(tensor, 0, async_op=True) for tensor in tensors]:
            if work is not None:
                work.wait()


def parallel(model: nn.Module, strategy: str, world: World) -> nn.Module:
    """The model to call in training: DDP around it, or itself with its parameters shared out (FSDP2, in place)."""
    if strategy == "fsdp":
        _shard(model, world)
        return model
    if world.size == 1:
        return model
    if world.device.type == "cuda":
        return nn.parallel.DistributedDataParallel(model, device_ids=[world.device.index])
    # After its first step DDP puts gradients into other buckets, so that of three processes or more a run that goes on
    # adds them in another order than one that was not interrupted. It does not where it looks for unused parameters.
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=world.size > 2)


def _shard(model: nn.Module, world: World) -> None:
    if not dist.is_initialized():
        raise ValueError(
            "strategy='fsdp' needs processes: start with torchrun --nproc-per-node N, or use strategy='ddp'"
        )
    mesh = init_device_mesh(world.device.type, (world.size,))
    # blocks and stages live in lists; children come before the lists that hold them
    for parent in reversed(list(model.modules())):
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            for child in parent.children():
                callable_whole = not isinstance(child, nn.ModuleList | nn.ModuleDict | FSDPModule)
                # below this, gathering costs more than it saves
                if callable_whole and sum(p.numel() for p in child.parameters()) >= 1 << 16:
                    fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Within this, a sharded model holds all its parameters, so that processes may call it unequally often."""
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    yield
    for part in parts:
        part.reshard()
        if part is not model:
            part.set_reshard_after_forward(True, recurse=False)


def share_buffers(model: nn.Module) -> None:
    """Running statistics of the first process for all, so that evaluations and checkpoints are the same everywhere."""
    copy_from_main(buffer for buffer in model.buffers() if buffer.is_floating_point())


@contextmanager
def local_gradients(model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients stay on their process until the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


class Interrupts:
    """Notes SIGINT and SIGTERM, so that the loop can end a step first. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
