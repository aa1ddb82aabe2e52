# SPDX-License-Identifier: Apache-2.0
"""The CPU kernel of `sola::wkv`: a shared library in C++ (`csrc/`), built at install where a compiler was there.

`load` registers it with torch's dispatcher, after which CPU tensors take it everywhere: eager, compiled and exported.
The library speaks torch's stable C ABI only, and picks the instruction set when it is loaded.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch

from sola_vision.ops import register  # noqa: F401 - defines the operators that the library implements

# glibc gives the top of its heap back to the system when more is free than twice the largest block that was ever freed
# in one piece, 32 MiB at most. Activations then cost page faults in every forward. Freeing one such block, untouched,
# makes the process keep 64 MiB.
torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8, device="cpu")

_LIBRARY = Path(__file__).with_name("_kernel.so")


@cache
def load() -> str | None:
    """Registers the CPU kernel, the first time. None, or why there is none and the portable form runs instead."""
    if not _LIBRARY.exists():
        # a clone that was installed as a copy has none in its own folder, which Python finds first when it starts there
        return (
            f"no CPU kernel in {_LIBRARY.parent}; install where a C++ compiler is found (CXX, default c++), "
            "and a clone with pip install --editable"
        )
    try:
        reason = _functions().sola_load(0)
    except (OSError, AttributeError) as error:
        return f"the CPU kernel does not load: {error}"
    return f"the CPU kernel does not fit this torch: {reason.decode()}" if reason else None


def instruction_set(name: str | None = None) -> str:
    """What the CPU kernel uses: "amx", "avx512_bf16", "avx512", "avx2" or "generic"; with a name, switches to it first
    (for the process). "avx512_bf16" and "amx" are "avx512" with other products of bfloat16.

    RuntimeError where there is no kernel, ValueError for an instruction set that this machine lacks.
    """
    reason = load()
    if reason is not None:
        raise RuntimeError(reason)
    found = _functions().sola_instruction_set(name.encode() if name is not None else None)
    if found is None:
        raise ValueError(
            f"instruction_set({name!r}): this machine has not got it; choose a simpler one, such as generic"
        )
    return found.decode()


@torch.compiler.assume_constant_result
def multiplies(dtype: torch.dtype) -> bool:
    """Whether there is a kernel whose products hold their own beside those of torch's libraries."""
    if load() is not None:
        return False
    # without AVX2 there are no fused multiply-adds
    sets = {torch.float32: ("avx2", "avx512", "avx512_bf16", "amx"), torch.bfloat16: ("avx512_bf16", "amx")}
    return instruction_set() in sets.get(dtype, ())


@cache
def _functions() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_LIBRARY))
    library.sola_load.argtypes, library.sola_load.restype = [ctypes.c_int], ctypes.c_char_p
    library.sola_instruction_set.argtypes = [ctypes.c_char_p]
    library.sola_instruction_set.restype = ctypes.c_char_p
    return library
