# SPDX-License-Identifier: Apache-2.0
"""Distributed training: the process group that torchrun starts, its collectives, DDP and FSDP, and signals.

Everything here also works in a single process without a group. Objects and CPU tensors are sent over gloo, GPU
tensors over nccl.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
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
    """The rank of this process, the number of processes in the run, and this process's device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the first process, which writes files and logs."""
        return self.rank == 0


@contextmanager
def distributed(device: str = "auto") -> Iterator[World]:
    """Set up the process group described by torchrun's environment; a world of size 1 without it. May be nested."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    place = _device(device, local_rank)
    owner = "RANK" in os.environ and "WORLD_SIZE" in os.environ and not dist.is_initialized()
    if owner:
        # both backends, so that small objects do not have to pass through the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo")
    try:
        if dist.is_initialized():
            yield World(dist.get_rank(), dist.get_world_size(), place)
        else:
            yield World(0, 1, place)
    except BaseException:
        # other processes may be inside a collective: nccl would wait for them here, but torchrun terminates them
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
        raise ValueError(f"device={name!r} is not a torch device: use auto, cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r} is not supported for training: use auto, cpu or cuda")
    if device.type == "cpu":
        return device
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"device={name!r} needs GPU {index}, but the number of GPUs is {torch.cuda.device_count()}: use device=cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def set_precision(device: torch.device) -> None:
    """Set TF32 matrix products and deterministic cuDNN algorithms on a GPU."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
        # benchmarking may select other algorithms after resuming, and some of them sum in no fixed order
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Return the sum over all processes; `tensor` itself is not modified."""
    total = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def gather_objects(items: list[T]) -> list[T]:
    """Return the lists of all processes concatenated in rank order, on every process."""
    if not dist.is_initialized():
        return list(items)
    lists: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


def on_main(function: Callable[[], T]) -> T:
    """Call `function` on the first process; return its result, or raise its OSError or ValueError, on every process."""
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
    """Overwrite the tensors of every process with those of the first, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for work in [dist.broadcast(tensor, 0, async_op=True) for tensor in tensors]:
            if work is not None:
                work.wait()


def parallel(model: nn.Module, strategy: str, world: World) -> nn.Module:
    """Return the model to call in training: wrapped in DDP, or itself with sharded parameters (FSDP2, in place)."""
    if strategy == "fsdp":
        _shard(model, world)
        return model
    if world.size == 1:
        return model
    for parameter in model.parameters():
        if parameter.requires_grad and 1 in parameter.shape:
            parameter.register_hook(partial(_restride, stride=parameter.stride()))
    if world.device.type == "cuda":
        return nn.parallel.DistributedDataParallel(model, device_ids=[world.device.index])
    # After its first step DDP rebuilds its gradient buckets, so with three or more processes a resumed run would sum
    # gradients in another order than an uninterrupted one. It does not rebuild them with find_unused_parameters.
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=world.size > 2)


def _restride(grad: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Return a gradient with the strides of its parameter where they differ in dimensions of one element only.

    The weights of depth-wise convolutions get such gradients from channels-last images. The memory is the same, but DDP
    compares all strides and warns.
    """
    differing = {size for size, one, other in zip(grad.shape, grad.stride(), stride, strict=True) if one != other}
    return grad.as_strided(grad.shape, stride) if differing == {1} else grad


def _shard(model: nn.Module, world: World) -> None:
    if not dist.is_initialized():
        raise ValueError(
            "strategy='fsdp' needs a process group: start with torchrun --nproc-per-node N, or use strategy='ddp'"
        )
    mesh = init_device_mesh(world.device.type, (world.size,))
    # blocks and stages are held in lists; children come before the lists that hold them
    for parent in reversed(list(model.modules())):
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            for child in parent.children():
                callable_whole = not isinstance(child, nn.ModuleList | nn.ModuleDict | FSDPModule)
                # for smaller modules, gathering costs more than sharding saves
                if callable_whole and sum(p.numel() for p in child.parameters()) >= 1 << 16:
                    fully_shard(child, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Unshard an FSDP model within this context, so that processes may call it different numbers of times."""
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
    """Copy running statistics from the first process, so that evaluation and checkpoints agree on all processes."""
    copy_from_main(buffer for buffer in model.buffers() if buffer.is_floating_point())


@contextmanager
def local_gradients(model: nn.Module, last: bool) -> Iterator[None]:
    """Synchronise gradients between processes only in the last micro-batch of a step."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        yield
    elif isinstance(model, nn.parallel.DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


class Interrupts:
    """Record SIGINT and SIGTERM, so that the loop can finish its step first. A second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():  # handlers can only be set there
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
