# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels of networks, in one process per width on separate cores: sequentially it takes minutes.

Triton caches the binaries on disk for the other parts.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

SIZE = 224


def compile_all(names: list[str]) -> bool:
    """Compile for the named networks at SIZE; return True if every process succeeded."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return all(pool.map(compile_layer, layers(names)))


def layers(names: list[str]) -> list[tuple[int, int]]:
    """Return width and side of the maps of every stage, the widest first."""
    from sola_vision.analysis.cost import build

    configs = [build(name, (SIZE, SIZE)).config for name in names if name.startswith("sola_")]
    found = {
        (dim, SIZE // stride) for config in configs for dim, stride in zip(config.dims, config.strides, strict=True)
    }
    return sorted(found, reverse=True)


def compile_layer(layer: tuple[int, int]) -> bool:
    """Compile one width in a process; return True if it succeeded."""
    return subprocess.run([sys.executable, __file__, *map(str, layer)]).returncode == 0


def call(dim: int, side: int, device: str = "cuda") -> None:
    """Run training step and inference of a linear layer and of the norms of other layers under autocast, as the models
    are measured.
    """
    from sola_vision.layers import LayerNorm, LinearLayer

    layer, norm = LinearLayer(dim).to(device), LayerNorm(dim).to(device)
    x = torch.randn(2, side, side, dim, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        (layer(x)[0].float().sum() + norm(x).sum() + norm(x.bfloat16()).sum()).backward()
        with torch.inference_mode():
            layer(x)


if __name__ == "__main__":
    call(int(sys.argv[1]), int(sys.argv[2]))
