# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of exported ONNX files in onnxruntime, compared with eager PyTorch on both paths.

    python benchmarks/export.py                # writes benchmarks/results/export.json
    python benchmarks/export.py --networks     # memory only, which other programs on the machine do not affect

Rounds interleave the jobs (sola_vision.bench.rounds). Memory is what a fresh process with onnxruntime alone needs for
an image in addition to that for one of 64 pixels, without an arena, for a schedule without softmax layers.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from measures import add_out

import sola_vision
from sola_vision import ops
from sola_vision.bench.rounds import Protocol, interleave, ratio
from sola_vision.engine.log import write_json
from sola_vision.export import classifier, export

LINEAR = "LL/LL/LLLLLL/LL"
PEAK = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[3])
options.enable_cpu_mem_arena = False
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
def kibibytes(side):
    session.run(None, {"images": numpy.zeros((1, 3, side, side), numpy.float32)})
    lines = open('/proc/self/status').read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))
before = kibibytes(64)
print(kibibytes(int(sys.argv[2])) - before)
"""


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--networks",
        nargs="*",
        default=["sola_nano", "sola_tiny", "sola_small"],
        help="networks to measure the speed of",
    )
    parser.add_argument("--sizes", nargs="+", type=int, default=[224, 512])
    parser.add_argument(
        "--precisions", nargs="+", default=["float32", "int8"], help="precisions to measure; must include float32"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    add_out(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"machine": machine(options.threads), "speed": [], "memory": []}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.networks:
            files = {precision: write_onnx(name, precision, Path(folder)) for precision in options.precisions}
            for size in options.sizes:
                results["speed"].append(speed(name, size, files, options))
                print(json.dumps(results["speed"][-1]), flush=True)
        path = write_onnx("sola_nano", "float32", Path(folder), schedule=LINEAR)
        for size in (256, 512, 1024):
            command = [sys.executable, "-c", PEAK, str(path), str(size), str(options.threads)]
            mebibytes = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024
            results["memory"].append({"network": "sola_nano", "schedule": LINEAR, "size": size, "peak_mib": mebibytes})
            print(json.dumps(results["memory"][-1]), flush=True)
    write_json(options.out / "export.json", results)


def write_onnx(name: str, precision: Any, folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    path = folder / f"{name}-{precision}-{'-'.join(map(str, changes.values())).replace('/', '_')}.onnx"
    network = classifier(timm.create_model(name, **changes))
    report = export(network, path, precision=precision, sizes=[(64, 96)], batches=[1])
    if not report.ok:
        raise SystemExit(f"{path.name} differs from the network: {report.comparisons}")
    return path


def speed(name: str, size: int, files: dict[str, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Time a network on one image."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    image = torch.randn(1, 3, size, size)

    def eager(path: ops.Path) -> Callable[[], object]:
        def call() -> object:
            with torch.inference_mode(), ops.use(path):
                return model(image)

        return call

    jobs: dict[str, Callable[[], object]] = {"eager portable": eager("portable")}
    if ops.missing_kernel("cpu") is None:
        jobs["eager native"] = eager("native")
    for precision, path in files.items():
        session, feed = load_session(path, options.threads), {"images": image.numpy()}
        jobs[f"onnxruntime {precision}"] = partial(session.run, None, feed)
    times = interleave(jobs, Protocol(rounds=options.rounds))
    faster, spread = ratio(times["eager portable"], times["onnxruntime float32"])
    return {
        "network": name,
        "size": size,
        "batch": 1,
        "milliseconds": {job: 1000 * result.median for job, result in times.items()},
        "spread": {job: result.spread for job, result in times.items()},
        "eager_portable_over_onnxruntime": {"ratio": faster, "spread": spread},
    }


def load_session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def machine(threads: int) -> dict[str, Any]:
    import onnxruntime

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "sola_vision": sola_vision.__version__,
        "commit": commit,
        "instruction_set": ops.cpu.instruction_set() if ops.missing_kernel("cpu") is None else None,
    }


if __name__ == "__main__":
    run()
