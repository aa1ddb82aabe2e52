# SPDX-License-Identifier: Apache-2.0
"""All measurements on a GPU, in a few calls; each part writes benchmarks/results/gpu-<part>.json.

    python benchmarks/gpu.py correct                        # the kernel against its definition
    python benchmarks/gpu.py operator --vision-rwkv DIR     # its speed against HBM, SDPA, portable, Vision-RWKV's CUDA
    python benchmarks/gpu.py passes                         # the element-wise passes against HBM and plain torch
    python benchmarks/gpu.py models                         # images/s and memory against timm's models, eager
    python benchmarks/gpu.py models --mode graph            # replays of CUDA graphs, which launch nothing
    python benchmarks/gpu.py models --mode compiled --only NAME ...
    python benchmarks/gpu.py models --size 1024 --batch 8
    python benchmarks/gpu.py profile                        # the kernels that take the time
    python benchmarks/gpu.py all --vision-rwkv DIR          # compile and all of these, networks as graphs too
    python benchmarks/gpu.py build-vision-rwkv DIR          # in advance, e.g. during another part
    python benchmarks/gpu.py compile                        # in advance: the networks' kernels, on all cores

DIR is a checkout of Vision-RWKV or the folder with its kernel's sources. When --minutes are over, or an error occurs, a
part stops after a measurement and keeps the rows written so far. A copy without .git needs --commit.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gpu_models
import gpu_profile
import gpu_vision_rwkv
import torch
from gpu_compile import compile_all
from gpu_correct import correct
from gpu_operator import operator
from gpu_passes import passes
from gpu_timing import Clock, first_line, report, write
from measures import add_out, gpu_measures, listing, load

Part = Callable[[], Iterable[dict[str, Any]]]


def main() -> int:
    args = parse()
    if not torch.cuda.is_available():
        return fail("torch has no CUDA device; run this on a machine with a GPU")
    use_kernel()
    if args.part == "build-vision-rwkv":
        return 0 if gpu_vision_rwkv.build(args.folder) is not None else 1
    if args.part == "compile":
        return 0 if compile_all(gpu_models.MODELS) else 1
    failed = [] if args.part != "all" or compile_all(gpu_models.MODELS) else ["compile"]
    failed += [name for name, part in selected_parts(args).items() if not run_part(name, part, args.out, args.commit)]
    print(f"\n{listing(gpu_measures(load(args.out)))}")
    if failed:
        print(f"benchmarks/gpu.py: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    add = functools.partial(parts.add_parser, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    names = {
        "correct": add("correct", help="kernel against reference: values, gradients, graphs, compile"),
        "operator": add("operator", help="speed of the operator"),
        "passes": add("passes", help="speed of the element-wise passes"),
        "models": add("models", help="throughput and memory of networks, inference and training, bf16"),
        "profile": add("profile", help="the kernels that take the time of networks and of the operator"),
        "all": add("all", help="compile, correct, operator, models (eager, graph), passes, profile"),
    }
    add("compile", help="compile the networks' kernels, one process per width")
    build = add("build-vision-rwkv", help="build Vision-RWKV's kernel into torch's cache of extensions")
    build.add_argument("folder", type=Path, metavar="DIR")
    for name in ("operator", "all"):
        names[name].add_argument("--vision-rwkv", type=Path, metavar="DIR", help="Vision-RWKV or its kernel's sources")
    for name in ("models", "profile"):
        usual = gpu_models.MODELS if name == "models" else gpu_profile.MODELS
        names[name].add_argument("--only", nargs="+", default=usual, metavar="NAME", help="timm names")
        names[name].add_argument("--batch", type=positive, default=128)
        names[name].add_argument("--size", type=positive, default=224, help="height and width of images")
    modes = ("eager", "graph", "compiled")
    names["models"].add_argument("--mode", choices=modes, default="eager", help="compiled takes minutes per model")
    for name in ("operator", "passes", "models", "all"):
        names[name].add_argument("--rounds", type=positive, default=5)
    for sub in names.values():
        sub.add_argument("--minutes", type=float, default=9.0)
        add_out(sub)
        sub.add_argument("--commit", metavar="HASH", help="commit to store in the files if git cannot tell it")
    args = parser.parse_args()
    for folder in (getattr(args, "vision_rwkv", None), getattr(args, "folder", None)):
        if folder is not None and not gpu_vision_rwkv.sources(folder):
            sys.exit(
                fail(f"{folder}: no such folder, or no .cpp and .cu files in it or in its {gpu_vision_rwkv.INSIDE}")
            )
    return args


def positive(text: str) -> int:
    """Parse an integer of at least 1, as argparse's type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


def fail(reason: str) -> int:
    """Print the reason and return exit code 2."""
    print(f"benchmarks/gpu.py: {reason}", file=sys.stderr)
    return 2


def selected_parts(args: argparse.Namespace) -> dict[str, Part]:
    """Return the parts to run by the name of their file."""
    clock = Clock(args.minutes)
    if args.part == "all":
        return {
            "correct": lambda: correct(clock),
            "operator": lambda: operator(args.rounds, clock, args.vision_rwkv),
            "models": lambda: gpu_models.models(gpu_models.MODELS, 224, 128, args.rounds, clock, "eager"),
            "models-graph": lambda: gpu_models.models(gpu_models.MODELS, 224, 128, args.rounds, clock, "graph"),
            "passes": lambda: passes(args.rounds, clock),
            "profile": lambda: gpu_profile.profiles(gpu_profile.MODELS, 224, 128, clock),
        }
    if args.part == "correct":
        return {"correct": lambda: correct(clock)}
    if args.part == "operator":
        return {"operator": lambda: operator(args.rounds, clock, args.vision_rwkv)}
    if args.part == "passes":
        return {"passes": lambda: passes(args.rounds, clock)}
    if args.part == "profile":
        return {"profile": lambda: gpu_profile.profiles(args.only, args.size, args.batch, clock)}
    name = "models" + f"-{args.size}" * (args.size != 224) + f"-{args.mode}" * (args.mode != "eager")
    return {
        name: lambda: gpu_models.models(args.only, args.size, args.batch, args.rounds, clock, args.mode),
    }


def run_part(name: str, part: Part, folder: Path, commit: str | None) -> bool:
    """Run a part and write its rows, also those before a failure; return True if it has any and all are ok."""
    rows: list[dict[str, Any]] = []
    good = True
    try:
        torch.cuda.empty_cache()
        for row in part():
            rows.append(row)
            (gpu_profile.show if "kernels" in row else report)(row)
            write(folder / f"gpu-{name}.json", rows, commit)  # after each row, so that an interrupted run keeps it
    except Exception as error:  # do not lose the other parts and the rows so far
        good = False
        print(f"{name}: stopped: {first_line(error)}", flush=True)
    if rows:
        print(f"wrote {folder / f'gpu-{name}.json'}", flush=True)
    return good and bool(rows) and all(row.get("ok", True) for row in rows)


def use_kernel() -> None:
    """Register the GPU kernel also where the package would not."""
    from sola_vision import ops
    from sola_vision.ops import gpu, register

    if ops.missing_kernel("cuda") is not None:
        gpu.register(register.library)


if __name__ == "__main__":
    sys.exit(main())
