# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels: a C++ shared library (`csrc/`), built during installation if a compiler is available.

`load` registers them with torch's dispatcher, which then selects them for CPU tensors in eager, compiled and exported
code. The library uses only torch's stable C ABI; it selects the instruction set when it is loaded.
"""

import ctypes
import threading
from functools import cache
from pathlib import Path

import torch

from sola_vision.ops import register  # noqa: F401 - defines the operators that the library implements

# glibc returns the top of its heap to the system once more memory is free there than twice the largest mmapped block
# freed so far, which counts up to 32 MiB. Activations then cost page faults in every forward. Freeing one such block,
# never written to, makes the process keep 64 MiB.
torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8, device="cpu")

_LIBRARY = Path(__file__).with_name("_kernel.so")


@cache
def load() -> str | None:
    """Register the CPU kernels on the first call. Return None, or the reason why they are unavailable."""
    if not _LIBRARY.exists():
        # after a non-editable install, Python started in the clone imports the clone's package, which has no library
        return (
            f"no CPU kernel in {_LIBRARY.parent}; reinstall with a C++ compiler available (CXX, default c++), "
            "and install a clone with pip install --editable"
        )
    try:
        reason = _functions().sola_load(0)
        if reason is None:
            _select(None)
    except (OSError, AttributeError) as error:
        return f"the CPU kernel could not be loaded: {error}"
    return f"the CPU kernel is incompatible with this torch: {reason.decode()}" if reason else None


def instruction_set(name: str | None = None) -> str:
    """Return the instruction set of the CPU kernels: "amx", "avx512_bf16", "avx512", "avx2" or "generic". With a name,
    switch to it first (for the process). "avx512_bf16" and "amx" are "avx512" with other products and conversions in
    bfloat16.

    Raises RuntimeError if the kernels are unavailable, ValueError if this CPU does not support the instruction set.
    """
    reason = load()
    if reason is not None:
        raise RuntimeError(reason)
    selected = _select(name)
    if selected is None:
        raise ValueError(f"instruction_set({name!r}): not supported by this CPU; use a lower one, such as 'generic'")
    return selected


# instruction sets with fast matrix products; without AVX2 there are no fused multiply-adds
_FAST_PRODUCTS = {torch.float32: ("avx2", "avx512", "avx512_bf16", "amx"), torch.bfloat16: ("avx512_bf16", "amx")}
# the dtypes of the current instruction set, cached because calling the library is slower; the lock keeps both in step
_fast_dtypes: frozenset[torch.dtype] = frozenset()
_selecting = threading.Lock()


def _select(name: str | None) -> str | None:
    """Switch to an instruction set if a name is given; return the current one, or None if it is not supported."""
    global _fast_dtypes
    with _selecting:
        selected = _functions().sola_instruction_set(name.encode() if name is not None else None)
        if selected is None:
            return None
        current: str = selected.decode()
        _fast_dtypes = frozenset(dtype for dtype, names in _FAST_PRODUCTS.items() if current in names)
        return current


@torch.compiler.assume_constant_result
def multiplies(dtype: torch.dtype) -> bool:
    """True if the kernels of the current instruction set multiply matrices of this dtype about as fast as torch's
    libraries do.
    """
    return load() is None and dtype in _fast_dtypes


@cache
def _functions() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_LIBRARY))
    library.sola_load.argtypes, library.sola_load.restype = [ctypes.c_int], ctypes.c_char_p
    library.sola_instruction_set.argtypes = [ctypes.c_char_p]
    library.sola_instruction_set.restype = ctypes.c_char_p
    return library
