# SPDX-License-Identifier: Apache-2.0
"""Vision-RWKV's present CUDA kernel (its folder cuda_new), built for this GPU and kept, so that one may build ahead.

It is written for float32, takes any number of tokens, and channels in multiples of 32.
"""

import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch

INSIDE = Path("classification/mmcls_custom/models/backbones/cuda_new")
# What newer versions of torch no longer have, and where it went: the header THC/THCAtomics.cuh, and dispatch by the
# deprecated x.type(). Applied to a copy; the kernels themselves stay as they are.
PATCHES = [
    (re.compile(r"#include\s*<THC/THCAtomics\.cuh>"), "#include <ATen/cuda/Atomic.cuh>"),
    (re.compile(r"(AT_DISPATCH_\w+\(\s*\w+)\.type\(\)"), r"\1.scalar_type()"),
]


def sources(folder: Path) -> list[Path]:
    """The sources in a checkout of Vision-RWKV, or in the folder of the sources itself; [] where there are none."""
    for place in (folder / INSIDE, folder):
        found = sorted([*place.glob("*.cpp"), *place.glob("*.cu")])
        if found:
            return found
    return []


def build(folder: Path) -> Any:
    """The module with bi_wkv_forward(w, u, k, v) and bi_wkv_backward(w, u, k, v, gy); only loaded if it is built.

    None, with the compiler's first errors printed, where it does not build.
    """
    try:
        from torch.utils.cpp_extension import load

        os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))  # ninja
        place, copies = patched(sources(folder))
        # the same name, sources, flags and place: load() finds what it has built
        return load("bi_wkv", [str(x) for x in copies], extra_cuda_cflags=flags(), build_directory=str(place))
    except Exception as error:  # a toolkit that is missing shows in many ways, and the rest is worth measuring
        print("vision-rwkv: it does not build", *errors(str(error)), sep="\n  ", flush=True)
        return None


def flags() -> list[str]:
    """Vision-RWKV's own, but for the architecture: theirs names one generation."""
    major, minor = torch.cuda.get_device_capability()
    arch = f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}"
    return ["--use_fast_math", "-O3", "--maxrregcount=60", "-Xptxas", "-O3", arch]


def patched(files: list[Path]) -> tuple[Path, list[Path]]:
    """A folder of torch's cache of extensions that belongs to these sources, and their patched copies in it."""
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
        if not copy.exists() or copy.read_text() != text:  # an untouched copy is not compiled again
            copy.write_text(text)
    return place, [place / name for name in texts]


def errors(text: str, count: int = 10) -> list[str]:
    """The lines of a build's output that name an error, or its first lines; not the commands, which are long."""
    lines = [line.rstrip()[:200] for line in text.splitlines() if line.strip() and " -DTORCH_" not in line]
    named = [line for line in lines if re.search(r"\berror\b|\bfatal\b|not found|denied|No such", line, re.IGNORECASE)]
    return (named or lines)[:count]
