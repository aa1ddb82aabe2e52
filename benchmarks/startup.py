# SPDX-License-Identifier: Apache-2.0
"""Cold start of the command line compared with importing timm: whole processes, in interleaved rounds, files in memory.

    python benchmarks/startup.py               # writes benchmarks/results/startup.json; a minute on an idle machine

The first round loads the files into memory and is not counted.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from measures import add_out
from PIL import Image

from sola_vision import tasks
from sola_vision.engine.log import surroundings, write_json

NETWORK = "sola_small"


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    add_out(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.jpg"
        Image.effect_noise((640, 480), 80).convert("RGB").save(picture)
        checkpoint = Path(folder) / NETWORK
        names = [f"class {i}" for i in range(1000)]
        tasks.save_pretrained(timm.create_model(NETWORK), checkpoint, classes=names)
        sola = [str(Path(sys.executable).with_name("sola"))]
        commands = {
            "import timm": [sys.executable, "-c", "import timm"],
            "sola --help": [*sola, "--help"],
            "sola predict": [*sola, "predict", str(picture), "--checkpoint", str(checkpoint)],
        }
        times: dict[str, list[float]] = {what: [] for what in commands}
        for number in range(options.rounds + 1):
            for what, command in commands.items():
                start = time.perf_counter()
                subprocess.run(command, capture_output=True, check=True)
                if number:
                    times[what].append(time.perf_counter() - start)
                    print(f"{what}: {times[what][-1]:.2f} s", flush=True)
    results: dict[str, Any] = {
        **surroundings(torch.device("cpu"), processes=1),
        "predict": f"{NETWORK}, 1000 classes, one JPEG of 640x480",
        "seconds": {what: median(found) for what, found in times.items()},
        "rounds": times,
    }
    write_json(options.out / "startup.json", results)


if __name__ == "__main__":
    run()
