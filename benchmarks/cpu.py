# SPDX-License-Identifier: Apache-2.0
"""All speed measurements on a CPU, for an otherwise idle machine; then the list of measures, met or not.

    python benchmarks/cpu.py                                # all parts, about forty minutes on two cores
    python benchmarks/cpu.py --part operator network224     # some of them, a few minutes each
    python benchmarks/cpu.py --list                         # only the list, from the existing files

A part is one or more `sola bench` commands, printed before they run; each writes benchmarks/results/<name>.json when it
is finished, so that --missing continues an interrupted run. `report.py` turns the files into the tables of the docs.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time

from measures import add_out, listing, load, measures

SMALL_TINY = "sola_tiny sola_small"
LAYOUTS = "contiguous channels_last"
# part -> name of the result -> the arguments of `sola bench`
PARTS: dict[str, dict[str, str]] = {
    "operator": {"operator": "op"},
    "accuracy": {
        "operator_accuracy": "op --accuracy",
        "operator_accuracy_triton": "op --accuracy --path triton --shape 1x300x5",
    },
    # in the interpreter at 56 x 56 tokens: about ten minutes; speed is not measured
    "interpreter": {"operator_accuracy_triton_3136": "op --accuracy --path triton --shape 1x3136x5"},
    "network224": {
        "network_224_f32": f"model {SMALL_TINY} --batch-size 8 --layout {LAYOUTS} --rounds 5",
        "network_224_bf16": f"model {SMALL_TINY} --batch-size 8 --layout {LAYOUTS} --dtype bfloat16 --rounds 5",
    },
    "network1024": {
        "network_1024": f"model {SMALL_TINY} --compare deit_tiny deit_small swin_tiny --size 1024 --rounds 5",
    },
    "growth": {"growth": "model sola_tiny --compare --size 512 1024 2048 --rounds 5"},
    "training": {"training": "model sola_tiny --compare deit_tiny --batch-size 32 --train --rounds 5"},
    "compiled": {
        "compiled_224": f"model {SMALL_TINY} --compare deit_tiny deit_small --batch-size 8 --dtype float32 bfloat16"
        " --compile --no-memory --rounds 3",
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--rounds", type=int, help="rounds instead of each part's own number; fewer are faster and less accurate"
    )
    parser.add_argument("--missing", action="store_true", help="skip results that exist")
    add_out(parser)
    parser.add_argument("--list", action="store_true", help="measure nothing")
    options = parser.parse_args()
    failed = []
    for name, command in (item for part in options.part for item in PARTS[part].items()):
        file = options.out / f"{name}.json"
        if not options.list and not (options.missing and file.exists()):
            words = [*shlex.split(command), "--threads", str(options.threads), "--json", os.path.relpath(file)]
            if options.rounds is not None and "--accuracy" not in words:
                words += ["--rounds", str(options.rounds)]
            if run(words):
                failed.append(name)
    print(f"\n{listing(measures(load(options.out)))}")
    if failed:
        print(f"benchmarks/cpu.py: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(words: list[str]) -> int:
    """Run one `sola bench` command and return its exit code."""
    print(f"\n$ sola bench {shlex.join(words)}", flush=True)
    start = time.monotonic()
    # inherited thread numbers would override --threads
    kept = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    code = subprocess.run([sys.executable, "-m", "sola_vision", "bench", *words], env=kept, check=False).returncode
    print(f"{time.monotonic() - start:.0f} s", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
