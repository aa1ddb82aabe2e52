# SPDX-License-Identifier: Apache-2.0
"""The exchange between the processes of a run after every step: losses, and flags on which all have to agree.

One small tensor is summed over the processes. On a GPU its copy to the host is read one step late, so that the host
never waits for the step that it has just launched.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_FLAGS = ("failures", "stop", "save")


@dataclass
class Report:
    """The result of a step over all processes: means of the values, logical or of the flags."""

    step: int
    lr: float
    values: dict[str, float]
    flags: dict[str, bool]


class Reports:
    """Reduce the numbers of each step over all processes and read them without blocking an accelerator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._pending: deque[tuple[int, float, list[str], Tensor, torch.cuda.Event | None]] = deque()

    def send(self, step: int, lr: float, values: dict[str, Tensor], flags: dict[str, bool]) -> None:
        """Start the reduction of a step's values and flags."""
        losses = torch.stack([value.to(self.device, torch.float32) for value in values.values()])
        numbers = torch.cat([losses, torch.zeros(len(_FLAGS), device=self.device)])
        for index, name in enumerate(_FLAGS, start=len(values)):
            if flags[name]:
                numbers[index].fill_(1.0)  # launches a kernel; an assignment would be a copy that blocks
        if dist.is_initialized():
            dist.all_reduce(numbers)
            numbers[: len(values)] /= dist.get_world_size()
        ready = None
        if self.device.type == "cuda":
            host = torch.empty(numbers.shape, pin_memory=True)
            host.copy_(numbers, non_blocking=True)
            numbers, ready = host, torch.cuda.Event()
            ready.record()
        self._pending.append((step, lr, list(values), numbers, ready))

    def receive(self, everything: bool) -> Iterator[Report]:
        """Yield the finished reports: all on the CPU; on an accelerator all but the last, which is still running."""
        unfinished = 1 if self.device.type == "cuda" and not everything else 0
        while len(self._pending) > unfinished:
            step, lr, names, numbers, ready = self._pending.popleft()
            if ready is not None:
                ready.synchronize()
            count = len(names)
            plain = numbers.tolist()
            flags = {name: value > 0 for name, value in zip(_FLAGS, plain[count:], strict=True)}
            yield Report(step, lr, dict(zip(names, plain[:count], strict=True)), flags)
