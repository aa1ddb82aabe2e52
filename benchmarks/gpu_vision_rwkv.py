# SPDX-License-Identifier: Apache-2.0
"""Vision-RWKV's current CUDA kernel (its folder cuda_new), built for this GPU and cached, so it can be built early.

It supports float32, any number of tokens, and channels in multiples of 32.
"""

import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

INSIDE = Path("classification/mmcls_custom/models/backbones/cuda_new")
# replacements for what newer versions of torch have removed: the header THC/THCAtomics.cuh, and dispatch by the
# deprecated x.type(). Applied to a copy; the kernels themselves are unchanged.
PATCHES = [
    (re.compile(r"#include\s*<THC/THCAtomics\.cuh>"), "#include <ATen/cuda/Atomic.cuh>"),
    (re.compile(r"(AT_DISPATCH_\w+\(\s*\w+)\.type\(\)"), r"\1.scalar_type()"),
]


def sources(folder: Path) -> list[Path]:
    """Return the sources in a checkout of Vision-RWKV, or in the folder of the sources itself; [] if not found."""
    for place in (folder / INSIDE, folder):
        found = sorted([*place.glob("*.cpp"), *place.glob("*.cu")])
        if found:
            return found
    return []


def build(folder: Path) -> Any:
    """Return the module with bi_wkv_forward(w, u, k, v) and bi_wkv_backward(w, u, k, v, gy), from the cache if built.

    Returns None, and prints the compiler's first errors, if it cannot be built.
    """
    try:
        from torch.utils.cpp_extension import load

        os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))  # ninja
        place, copies = patched(sources(folder))
        # load() reuses its build for the same name, sources, flags and folder
        return load("bi_wkv", [str(x) for x in copies], extra_cuda_cflags=flags(), build_directory=str(place))
    except Exception as error:  # a missing toolkit raises many kinds of errors, and the rest can be measured
        print("vision-rwkv: build failed", *errors(str(error)), sep="\n  ", flush=True)
        return None


def flags() -> list[str]:
    """Return Vision-RWKV's compiler flags, with this GPU's architecture instead of a fixed one."""
    major, minor = torch.cuda.get_device_capability()
    arch = f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}"
    return ["--use_fast_math", "-O3", "--maxrregcount=60", "-Xptxas", "-O3", arch]


def patched(files: list[Path]) -> tuple[Path, list[Path]]:
    """Return a folder for these sources in torch's cache of extensions, and their patched copies in it."""
    texts = {file.name: file.read_text() for file in files}
    for name, text in texts.items():
        for pattern, replacement in PATCHES:
            text = pattern.sub(replacement, text)
        texts[name] = text
    digest = hashlib.sha256(repr((sorted(texts.items()), flags(), torch.__version__)).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache/torch_extensions")
    place = cache / f"bi_wkv_{digest}"
    place.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        copy = place / name
        if not copy.exists() or copy.read_text() != text:  # an unchanged copy is not compiled again
            copy.write_text(text)
    return place, [place / name for name in texts]


def errors(text: str, count: int = 10) -> list[str]:
    """Return the lines of a build's output with an error, else its first lines; without the long commands."""
    lines = [line.rstrip()[:200] for line in text.splitlines() if line.strip() and " -DTORCH_" not in line]
    named = [line for line in lines if re.search(r"\berror\b|\bfatal\b|not found|denied|No such", line, re.IGNORECASE)]
    return (named or lines)[:count]
