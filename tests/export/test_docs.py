# SPDX-License-Identifier: Apache-2.0
"""All blocks of docs/export.md run, in order, in one folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sola_vision import ops
from sola_vision.data import ImageConfig
from sola_vision.engine import save_weights
from sola_vision.tasks import ModelConfig, build_model, metadata

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_block_runs(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    if ops.missing_kernel("cpu") is not None:
        pytest.skip("needs the CPU kernel")
    config, image = ModelConfig(name="sola_nano", schedule="L/S", dims=(8, 32)), ImageConfig(size=48)
    model = build_model(config, 3, image.size)
    (tmp_path / "runs" / "few_images").mkdir(parents=True)
    about = metadata("classification", config, image, ["ant", "bee", "cat"], model)
    save_weights(tmp_path / "runs" / "few_images" / "best.safetensors", model, about)
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "PICTURE.jpg")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, words in {"python": '"$@"', "sola": '-m sola_vision "$@"'}.items():
        (binaries / name).write_text(f"#!/bin/sh\nexec {sys.executable} {words}\n")
        (binaries / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{binaries}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    text = (ROOT / "docs" / "export.md").read_text()
    blocks = re.findall(r"```(sh|python)\n(.*?)```", text, re.S)
    assert [kind for kind, _ in blocks] == ["sh", "python", "python", "sh", "python", "sh"]
    for kind, block in blocks:
        if "torch.export.load" in block:  # the file of this block and that of the next have one name
            command = "sola export runs/few_images --format torch-export --out model.pt2"
            subprocess.run(["sh", "-ec", command], cwd=tmp_path, env=environment, check=True)
        lines = [line for line in block.splitlines() if not line.startswith("pip install")]
        words = ["sh", "-ec", "\n".join(lines)] if kind == "sh" else [sys.executable, "-c", block]
        ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
    logits = [float(line) for line in ended.stdout.split()]
    with torch.inference_mode():
        assert logits == pytest.approx(model.eval()(torch.ones(1, 3, 224, 224))[0].tolist(), abs=1e-4)
