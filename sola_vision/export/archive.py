# SPDX-License-Identifier: Apache-2.0
"""torch's own files: torch.export archives, and AOTInductor packages, which are compiled for this machine's CPU.

Both call `sola::wkv` and the other operators of this package by name. In Python `import sola_vision` provides them; a
program without Python loads the library of the CPU kernel and calls `sola_load(1)` (examples/aoti_classify.cpp).
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from sola_vision import ops
from sola_vision.export.check import Run
from sola_vision.export.networks import Exportable
from sola_vision.export.trace import trace


def save(network: Exportable, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a torch.export archive; torch.export.load returns the metadata in `extra_files`."""
    torch.export.save(trace(network.prepared(torch.float32), plain=False), path, extra_files=dict(metadata))


def load(path: Path) -> Run:
    """Load a torch.export archive."""
    return torch.export.load(path).module()


def compile_package(network: Exportable, path: Path, metadata: Mapping[str, str]) -> None:
    """Write an AOTInductor package; the loader's `get_metadata` returns the metadata. Raises ValueError without a C++
    compiler.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler

    program = trace(network.prepared(torch.float32), plain=False)
    configs = {"aot_inductor.metadata": dict(metadata)}
    try:
        aoti_compile_and_package(program, package_path=str(path), inductor_configs=configs)
    except (InvalidCxxCompiler, CppCompileError) as error:
        raise _no_compiler(error) from None
    except InductorError as error:
        if isinstance(error.__cause__, InvalidCxxCompiler | CppCompileError) or "CxxCompiler" in str(error):
            raise _no_compiler(error) from None
        raise


def _no_compiler(error: Exception) -> ValueError:
    first = str(error).strip().splitlines()[0]
    return ValueError(f"the format aoti needs a working C++ compiler (set CXX): {first}")


def load_package(path: Path) -> Run:
    """Load an AOTInductor package."""
    return torch._inductor.aoti_load_package(str(path))


def needs(format: str) -> str:
    """Return the requirements of a program that loads the file, in one line."""
    if format == "onnx":
        return "an ONNX runtime"
    if format == "torch-export":
        return "torch and `import sola_vision`"
    missing = ops.missing_kernel("cpu")
    without = f" ({missing})" if missing else "; without Python libtorch, sola_vision/ops/_kernel.so and sola_load(1)"
    # the package's own check (AOTI_RUNTIME_CHECK_INPUTS) cannot be used: it rejects every batch of one image
    return f"torch and `import sola_vision`{without}; contiguous float32 images, which the package does not check"
