# SPDX-License-Identifier: Apache-2.0
"""Build the CPU kernel if a C++ compiler is available; otherwise install a pure Python package.

The kernel is a plain shared library next to `sola_vision/ops/cpu.py`, not a Python extension module. It uses torch only
through its stable C ABI, whose functions are looked up by name at load time: the headers of Python and torch are not
needed, and one binary supports all versions of Python and torch that the package allows. `SOLA_REQUIRE_KERNEL=1` makes
a failed build an error; CXX and CXXFLAGS are honoured.
"""

import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = "sola_vision.ops._kernel"
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
# the kernels rely on fused multiply-adds; errno and traps would prevent loops from being vectorised
MATHS = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
# every CPU with AVX-512 has prefetchw; without it GCC compiles prefetches for writing to prefetches for reading
AVX512 = [*AVX2, "-mprfchw", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
# bfloat16 products: supported by compilers since GCC 11 and Clang 12, by assemblers since binutils 2.36
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
AMX = [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]
BFLOAT16_PRODUCTS = """
#include <immintrin.h>
__m512 pairs(__m512 sums, __m512bh a, __m512bh b) { return _mm512_dpbf16_ps(sums, a, b); }
void tiles(const void* from) {
  _tile_loadconfig(from);
  _tile_dpbf16ps(0, 1, 2);
}
"""


def kernel_sources(bfloat16: bool) -> dict[str, list[str]]:
    """Return {object file: compiler arguments}: the kernels once per instruction set, the registration once."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = {"generic": []} | ({"avx2": AVX2, "avx512": AVX512} if x86 else {})
    more = {"avx512_bf16": AVX512_BF16, "amx": AMX} if x86 and bfloat16 else {}
    pairs = {name: flags for name, flags in more.items() if name == "avx512_bf16"}
    products = {"linear": more, "attention": more, "wkv": pairs, "passes": pairs}  # and conversions, of bfloat16
    objects = {
        f"{source}_{name}": [f"csrc/{source}.cpp", f"-DSOLA_ISA={name}", *MATHS, *flags]
        for source in ("linear", "linear_backward", "wkv", "passes", "attention", "attention_backward")
        for name, flags in (sets | products.get(source, {})).items()
    }
    defines = (["-DSOLA_X86"] if x86 else []) + (["-DSOLA_BFLOAT16"] if more else [])
    for source in ("register", "register_passes", "register_attention", "register_linear"):
        objects[source] = [f"csrc/{source}.cpp", *defines]
    return objects


class BuildKernel(build_ext):
    """Compile the kernel with $CXX (default c++); if that fails, install the package without it."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = shlex.split(os.environ.get("CXX", "c++"))
        flags = shlex.split(os.environ.get("CXXFLAGS", ""))
        objects = Path(self.build_temp) / "kernel"
        objects.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)

        def compile_one(item: tuple[str, list[str]]) -> str:
            out = str(objects / f"{item[0]}.o")
            _run([*compiler, *COMMON, *item[1], *flags, "-c", "-o", out])
            return out

        try:
            bfloat16 = _compiles(compiler, [*COMMON, *AMX, *flags], BFLOAT16_PRODUCTS, objects / "trial.cpp")
            with ThreadPoolExecutor() as pool:
                compiled = list(pool.map(compile_one, kernel_sources(bfloat16).items()))
            kind = ["-dynamiclib"] if sys.platform == "darwin" else ["-shared", "-ldl"]
            _run([*compiler, *compiled, *kind, *flags, "-o", str(target)])
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("SOLA_REQUIRE_KERNEL", "0") != "0":
                raise
            print(
                f"sola-vision: installing without the CPU kernel; the portable path is used instead ({_reason(error)})"
            )
            target.unlink(missing_ok=True)

    # after a failed build the library does not exist and must be neither listed nor copied
    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        if all(Path(self.build_lib, self.get_ext_filename(ext.name)).exists() for ext in self.extensions):
            super().copy_extensions_to_source()


class AnyPythonWheel(bdist_wheel):
    """A wheel tagged for the platform but for any Python: the library does not use the Python API."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        built = any(Path(self.bdist_dir).rglob("_kernel.so"))
        return ("py3", "none", tag[2]) if built else ("py3", "none", "any")


def _reason(error: Exception) -> str:
    command = getattr(error, "cmd", None)
    return f"{command[0]} failed with status {error.returncode}" if command else str(error)


def _compiles(compiler: list[str], flags: list[str], code: str, file: Path) -> bool:
    """True if the compiler and its assembler accept this code."""
    file.write_text(code)
    command = [*compiler, *flags, "-c", "-o", str(file.with_suffix(".o")), str(file)]
    return subprocess.run(command, capture_output=True).returncode == 0


def _run(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    subprocess.run(command, check=True)


setup(
    ext_modules=[Extension(LIBRARY, sources=[], depends=[str(path) for path in sorted(Path("csrc").glob("*"))])],
    cmdclass={"build_ext": BuildKernel, "bdist_wheel": AnyPythonWheel},
)
