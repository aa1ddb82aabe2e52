# SPDX-License-Identifier: Apache-2.0
"""Bi-WKV on CUDA: launches the kernels of `triton_kernels.py` and registers them with torch's dispatcher.

Triton is imported at the first call, not with the package, and may be missing. Nothing here waits for the device, and
scratch comes from torch's allocator, so that CUDA graphs can capture a call. The result is the same to the bit from run
to run: no atomics, and every sum has a fixed order. Without a device the same functions take CPU tensors when Triton
interprets (TRITON_INTERPRET=1 at the first call): that is how the kernels are tested everywhere.
"""

import importlib.util

import torch
from torch import Tensor

from sola_vision.ops import portable
from sola_vision.ops.launch import launch, on_device_of

# tokens of a chunk: what a program keeps in registers
_FORWARD_CHUNK, _BACKWARD_CHUNK = 32, 16
# registers that a lane may have: what a phase's narrow path needs. The wide one, which is rare, makes do with them
_SUMS, _OUTPUTS, _BACK_SUMS, _GRADIENTS = 96, 128, 80, 144
# sums that one program of the middle phase scans in a row, and when a row is long enough to be scanned in groups
_GROUP = 32
_LONG = 256
# sums that it reads at once, and parts of gradients that are read at once
_AHEAD, _PARTS_AHEAD = 8, 16
# float32 numbers in a line of the device's cache
_LINE = 32
# one warp a program; fused multiply-adds by name, because Triton's default changes from version to version
_OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


def missing() -> str | None:
    """Why there are no kernels for CUDA; None if there are."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


def register(library: torch.library.Library) -> None:
    """Make these functions the CUDA kernels of `wkv` and its relatives in the library, if Triton is there."""
    if missing() is None:
        library.impl("wkv", wkv, "CUDA")
        library.impl("wkv_with_states", wkv_with_states, "CUDA")
        library.impl("wkv_backward", wkv_backward, "CUDA")


def wkv(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Eq. 9: decay, bonus [C], key, value [B, N, C] -> [B, N, C] in value's dtype."""
    if _double(key, value):
        return portable.wkv(decay, bonus, key, value)
    return _forward(decay, bonus, key, value, _FORWARD_CHUNK)[0]


def wkv_with_states(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """`wkv` in the backward's shorter chunks, and what enters these: `states_size` numbers, in float32."""
    if _double(key, value):
        return portable.wkv(decay, bonus, key, value), key.new_empty(0, dtype=torch.float32)
    return _forward(decay, bonus, key, value, _BACKWARD_CHUNK)


def states_size(batch: int, num_tokens: int, channels: int) -> int:
    """How many numbers of the forward the backward needs; the arguments may be symbols of a compiler."""
    return sum(_kept(batch, -(-num_tokens // _BACKWARD_CHUNK), channels))


def _kept(batch: int, chunks: int, channels: int) -> tuple[int, int, int]:
    """Numbers of a step's decay, of chunks' exponents and of the states that enter chunks, each in lines of its own."""
    numbers = batch * chunks * channels
    step, references, states = (-(-size // _LINE) * _LINE for size in (2 * channels, numbers, 6 * numbers))
    return step, references, states


def _forward(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    with on_device_of(key):
        row = _Row(decay, bonus, key, value, length)
        if out.numel() != 0:
            row.enter_chunks()
            row.launch("outputs", _OUTPUTS, row.step, row.references, row.bonus, row.key, row.value, out, row.states)
    return out, row.kept


def wkv_backward(
    decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, states: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `wkv` for decay, bonus [C], key and value [B, N, C], each in its input's dtype; states are what
    `wkv_with_states` has found.
    """
    if _double(key, value, grad):
        return portable.wkv_backward(decay, bonus, key, value, grad)
    gk, gv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (key, value))
    if key.numel() == 0:
        return torch.zeros_like(decay), torch.zeros_like(bonus), gk, gv
    with on_device_of(key):
        row = _Row(decay, bonus, key, value, _BACKWARD_CHUNK, states)
        partials = row.scratch(2, row.batch, row.chunks, row.channels)
        inputs = (row.step, row.references, row.bonus, row.key, row.value, grad.contiguous(), gk, gv, partials)
        back_states = row.new_states(row.chunks)
        row.launch("backward", _BACK_SUMS, *inputs, row.states, back_states, WRITE=False)
        row.scan(back_states, by_b=False)
        row.launch("backward", _GRADIENTS, *inputs, row.states, back_states, WRITE=True)
        gw, gu = row.sum_partials(partials)
    return gw, gu, gk, gv


def _double(*tensors: Tensor) -> bool:
    # the kernels' state is float32
    return any(x.dtype == torch.float64 for x in tensors)


class _Row:
    """The inputs of one call as the kernels want them, and its grid of chunks."""

    def __init__(
        self, decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, length: int, kept: Tensor | None = None
    ) -> None:
        """`length` is a chunk's, at most; a power of two. kept: of a forward with such chunks."""
        from sola_vision.ops import triton_kernels

        self.kernels = triton_kernels
        self.decay, self.bonus = decay.contiguous(), bonus.contiguous()
        self.key, self.value = key.contiguous(), value.contiguous()
        self.batch, self.num_tokens, self.channels = key.shape
        self.length = min(length, 1 << (self.num_tokens - 1).bit_length())
        self.chunks = -(-self.num_tokens // self.length)
        self.sizes = (self.chunks, self.num_tokens, self.batch * self.chunks * self.channels)
        # one warp, a lane a channel; the interpreter's time goes by programs, not by lanes
        self.block = 32 if key.is_cuda else max(32, 1 << (self.channels - 1).bit_length())
        self.blocks = -(-self.channels // self.block)
        masked = bool(self.num_tokens % self.length or self.channels % self.block)
        self.constants = {"C": self.channels, "L": self.length, "BLOCK": self.block, "MASKED": masked}
        sizes = _kept(self.batch, self.chunks, self.channels)
        self.kept = self.scratch(sum(sizes)) if kept is None else kept.contiguous()
        self.step, self.references, self.states = self.kept.split(sizes)

    def new_states(self, count: int) -> Tensor:
        """Room for a state on each side of every chunk: exponent, a and b [3, 2, B, count, C]."""
        return self.scratch(3, 2, self.batch, count, self.channels)

    def scratch(self, *size: int) -> Tensor:
        # float32 whatever torch's default is: the kernels see int32 in it, too
        return torch.empty(size, dtype=torch.float32, device=self.key.device)

    def launch(self, name: str, registers: int, *tensors: Tensor, **flags: bool) -> None:
        programs = self.batch * self.chunks * self.blocks
        options = _OPTIONS if torch.version.hip else {**_OPTIONS, "maxnreg": registers}
        launch(getattr(self.kernels, name), programs, tensors, self.sizes, self.constants | flags, options)

    def enter_chunks(self) -> None:
        """Finds the states that enter every chunk from the left and from the right."""
        self.launch("chunk_sums", _SUMS, self.decay, self.key, self.value, self.step, self.references, self.states)
        self.scan(self.states, by_b=True)

    def scan(self, sums: Tensor, by_b: bool) -> None:
        """From the sums of the chunks to the states that enter them, in the same memory."""
        if self.chunks <= _LONG:
            self._scan(sums, None, sums, self.chunks, self.chunks, self.length, by_b)
            return
        groups = -(-self.chunks // _GROUP)
        totals, before = self.new_states(groups), self.new_states(groups)
        self._scan(sums, None, totals, self.chunks, _GROUP, self.length, by_b, totals=True)
        self._scan(totals, None, before, groups, groups, self.length * _GROUP, by_b)
        self._scan(sums, before, sums, self.chunks, _GROUP, self.length, by_b)

    def _scan(
        self,
        sums: Tensor,
        carry: Tensor | None,
        out: Tensor,
        count: int,
        group: int,
        steps: int,
        by_b: bool,
        totals: bool = False,
    ) -> None:
        groups = -(-count // group)
        launch(
            self.kernels.scan_states,
            2 * self.batch * groups * self.blocks,
            (self.decay, sums, sums if carry is None else carry, out),
            (self.batch, count, group, groups, steps, self.num_tokens),
            {
                "C": self.channels,
                "BLOCK": self.block,
                "AHEAD": _AHEAD,
                "CARRY": carry is not None,
                "TOTALS": totals,
                "BY_B": by_b,
            },
            _OPTIONS,
        )

    def sum_partials(self, partials: Tensor) -> tuple[Tensor, Tensor]:
        """[2, B, chunks, C] -> gw and gu [C], in float64 until they are stored."""
        images = torch.empty((2, self.batch, self.channels), dtype=torch.float64, device=partials.device)
        constants = {"C": self.channels, "BLOCK": self.block, "AHEAD": _PARTS_AHEAD}
        programs = 2 * self.batch * self.blocks
        launch(self.kernels.sum_partials, programs, (partials, images), (self.chunks,), constants, _OPTIONS)
        gw, gu = torch.empty_like(self.decay), torch.empty_like(self.bonus)
        sizes = (self.batch, self.num_tokens)
        launch(self.kernels.sum_images, 2 * self.blocks, (images, gw, gu), sizes, constants, _OPTIONS)
        return gw, gu
