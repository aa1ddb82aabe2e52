# SPDX-License-Identifier: Apache-2.0
"""Bi-WKV on CUDA: launch the kernels of `triton_kernels.py` and register them with torch's dispatcher.

Triton is an optional dependency, imported at the first call. Nothing here synchronizes with the device, and scratch
memory comes from torch's allocator, so that CUDA graphs can capture a call. Results are bitwise deterministic: no
atomics, and every sum has a fixed order. Without a device the same functions accept CPU tensors in Triton's interpreter
(TRITON_INTERPRET=1 at the first call), which is how the tests run the kernels on any machine.
"""

import importlib.util

import torch
from torch import Tensor

from sola_vision.ops import portable
from sola_vision.ops.launch import launch, on_device_of

# tokens of a chunk, which a program keeps in registers
_FORWARD_CHUNK, _BACKWARD_CHUNK = 32, 16
# maximum registers per thread: what the narrow path of a phase needs. The wide path, which is rare, has the same limit
_SUMS, _OUTPUTS, _BACK_SUMS, _GRADIENTS = 96, 128, 80, 144
_OUTPUTS_OF_SHORT_CHUNKS = 96  # of at most _BACKWARD_CHUNK tokens
# chunk sums that one program of phase 2 scans serially, and the number of chunks above which they are scanned in groups
_GROUP = 32
_LONG = 256
# prefetched chunk sums in phase 2, and prefetched partial sums of gradients
_AHEAD, _PARTS_AHEAD = 8, 16
# float32 values in a cache line of the device
_LINE = 32
# one warp per program; fused multiply-adds explicitly, because Triton's default changes between versions
_OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}


def missing() -> str | None:
    """Return the reason why the CUDA kernels are unavailable; None if they are available."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    return None


def register(library: torch.library.Library) -> None:
    """Register these functions as the CUDA kernels of `wkv` and its variants in the library, if Triton is installed."""
    if missing() is None:
        library.impl("wkv", wkv, "CUDA")
        library.impl("wkv_with_states", wkv_with_states, "CUDA")
        library.impl("wkv_backward", wkv_backward, "CUDA")


def wkv(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return eq. 9: decay, bonus [C], key, value [B, N, C] -> [B, N, C] in value's dtype."""
    if _any_float64(key, value):
        return portable.wkv(decay, bonus, key, value)
    return _forward(decay, bonus, key, value, _FORWARD_CHUNK)[0]


def wkv_with_states(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return `wkv`, computed in the backward's shorter chunks, and the saved states: `states_size` float32 values."""
    if _any_float64(key, value):
        return portable.wkv(decay, bonus, key, value), key.new_empty(0, dtype=torch.float32)
    return _forward(decay, bonus, key, value, _BACKWARD_CHUNK)


def states_size(batch: int, num_tokens: int, channels: int) -> int:
    """Return the number of values that the forward saves for the backward; the arguments may be symbolic integers."""
    return sum(_saved_sizes(batch, -(-num_tokens // _BACKWARD_CHUNK), channels))


def _saved_sizes(batch: int, chunks: int, channels: int) -> tuple[int, int, int]:
    """Return the sizes of the per-step decay, the chunks' exponents and entering states, padded to cache lines."""
    numbers = batch * chunks * channels
    step, references, states = (-(-size // _LINE) * _LINE for size in (2 * channels, numbers, 6 * numbers))
    return step, references, states


def _forward(decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, length: int) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    with on_device_of(key):
        call = _ChunkedCall(decay, bonus, key, value, length)
        if out.numel() != 0:
            call.compute_states()
            inputs = (call.step, call.references, call.bonus, call.key, call.value)
            registers = _OUTPUTS if call.length > _BACKWARD_CHUNK else _OUTPUTS_OF_SHORT_CHUNKS
            call.launch("outputs", registers, *inputs, out, call.states)
    return out, call.saved


def wkv_backward(
    decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, states: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `wkv` with respect to decay, bonus [C], key and value [B, N, C], in the inputs' dtypes;
    states are those returned by `wkv_with_states`.
    """
    if _any_float64(key, value, grad):
        return portable.wkv_backward(decay, bonus, key, value, grad)
    gk, gv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (key, value))
    if key.numel() == 0:
        return torch.zeros_like(decay), torch.zeros_like(bonus), gk, gv
    with on_device_of(key):
        call = _ChunkedCall(decay, bonus, key, value, _BACKWARD_CHUNK, states)
        partials = call.scratch(2, call.batch, call.chunks, call.channels)
        inputs = (call.step, call.references, call.bonus, call.key, call.value, grad.contiguous(), gk, gv, partials)
        back_states = call.new_states(call.chunks)
        call.launch("backward", _BACK_SUMS, *inputs, call.states, back_states, WRITE=False)
        call.scan(back_states, by_b=False)
        call.launch("backward", _GRADIENTS, *inputs, call.states, back_states, WRITE=True)
        gw, gu = call.sum_partials(partials)
    return gw, gu, gk, gv


def _any_float64(*tensors: Tensor) -> bool:
    # the kernels compute in float32
    return any(x.dtype == torch.float64 for x in tensors)


class _ChunkedCall:
    """The inputs of one call in the layout that the kernels read, and its grid of chunks."""

    def __init__(
        self, decay: Tensor, bonus: Tensor, key: Tensor, value: Tensor, length: int, saved: Tensor | None = None
    ) -> None:
        """length: the maximum tokens per chunk, a power of two. saved: the states of a forward with such chunks."""
        from sola_vision.ops import triton_kernels

        self.kernels = triton_kernels
        self.decay, self.bonus = decay.contiguous(), bonus.contiguous()
        self.key, self.value = key.contiguous(), value.contiguous()
        self.batch, self.num_tokens, self.channels = key.shape
        self.length = min(length, 1 << (self.num_tokens - 1).bit_length())
        self.chunks = -(-self.num_tokens // self.length)
        self.sizes = (self.chunks, self.num_tokens, self.batch * self.chunks * self.channels)
        # one warp, one channel per lane; the interpreter's time depends on the number of programs, not of lanes
        self.block = 32 if key.is_cuda else max(32, 1 << (self.channels - 1).bit_length())
        self.blocks = -(-self.channels // self.block)
        masked = bool(self.num_tokens % self.length or self.channels % self.block)
        self.constants = {"C": self.channels, "L": self.length, "BLOCK": self.block, "MASKED": masked}
        sizes = _saved_sizes(self.batch, self.chunks, self.channels)
        self.saved = self.scratch(sum(sizes)) if saved is None else saved.contiguous()
        self.step, self.references, self.states = self.saved.split(sizes)

    def new_states(self, count: int) -> Tensor:
        """Allocate the left and right states of `count` chunks: exponent, a and b [3, 2, B, count, C]."""
        return self.scratch(3, 2, self.batch, count, self.channels)

    def scratch(self, *size: int) -> Tensor:
        """Allocate uninitialized float32 memory."""
        # an explicit dtype, independent of torch's default: the kernels also store int32 there
        return torch.empty(size, dtype=torch.float32, device=self.key.device)

    def launch(self, name: str, registers: int, *tensors: Tensor, **flags: bool) -> None:
        """Launch a kernel with one program per chunk and block of channels."""
        programs = self.batch * self.chunks * self.blocks
        options = _OPTIONS if torch.version.hip else {**_OPTIONS, "maxnreg": registers}
        launch(getattr(self.kernels, name), programs, tensors, self.sizes, self.constants | flags, options)

    def compute_states(self) -> None:
        """Compute the states that enter every chunk from the left and from the right (phases 1 and 2)."""
        self.launch("chunk_sums", _SUMS, self.decay, self.key, self.value, self.step, self.references, self.states)
        self.scan(self.states, by_b=True)

    def scan(self, sums: Tensor, by_b: bool) -> None:
        """Replace the sums of the chunks, in place, by the states that enter them (phase 2)."""
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
        """Reduce [2, B, chunks, C] to gw and gu [C], in float64 up to the final rounding."""
        images = torch.empty((2, self.batch, self.channels), dtype=torch.float64, device=partials.device)
        constants = {"C": self.channels, "BLOCK": self.block, "AHEAD": _PARTS_AHEAD}
        programs = 2 * self.batch * self.blocks
        launch(self.kernels.sum_partials, programs, (partials, images), (self.chunks,), constants, _OPTIONS)
        gw, gu = torch.empty_like(self.decay), torch.empty_like(self.bonus)
        sizes = (self.batch, self.num_tokens)
        launch(self.kernels.sum_images, 2 * self.blocks, (images, gw, gu), sizes, constants, _OPTIONS)
        return gw, gu
