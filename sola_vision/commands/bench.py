# SPDX-License-Identifier: Apache-2.0
"""`sola bench op` and `sola bench model`: speed and memory on this machine, in interleaved rounds, against baselines.

The results are meaningful only on an otherwise idle machine. Names, paths and sizes are those of `sola cost`.
"""

import os
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from sola_vision.bench import accuracy, network, operator
from sola_vision.bench.rounds import Protocol
from sola_vision.commands.arguments import Arguments, check_minimum, check_parent_folder
from sola_vision.commands.networks import SIZE_HELP, full_name, image_sizes, short_name
from sola_vision.commands.tables import new_table, show_table
from sola_vision.engine.log import json_text, surroundings, write_json

COMPARED = ("resnet18", "deit_tiny", "deit_small", "efficientformer_l1", "swin_tiny", "convnext_tiny")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# the portable form takes seconds where the kernel takes milliseconds
_OPERATOR = Protocol(seconds=0.3, slow_rounds=2)
_COLUMNS = {
    "native": ("native", "repeated"),
    "native, streamed": ("native", "streamed"),
    "portable": ("portable", "repeated"),
    "attention": ("attention", "repeated"),
    "k + v": ("copy", "repeated"),
    "k + v, streamed": ("copy", "streamed"),
}


_LEGEND = """\
native: the compiled kernel; portable: plain torch; both: forward and backward.
k + v ("a copy"): one pass over the operator's data, which is the lower bound of its time.
attention: softmax attention with heads of 32 channels; only in float32, for channels that are a multiple of 32 and at \
most 2^28 pairs of tokens.
streamed: operands come from memory; otherwise the same ones are used again, from the cache if they fit.
target, met: this project's goal for the ratio, if it has one for this shape, and whether it is reached."""


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = _parse(arguments)
    _check(options)
    threads = torch.get_num_threads()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        if options.what == "model":
            _model(options)
        elif options.accuracy:
            _accuracy(options)
        else:
            _operator(options)
    finally:
        torch.set_num_threads(threads)


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = Arguments("sola bench", __doc__, formatter_class=RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="what", required=True)
    what = "the operator against the portable form, attention and a copy of its data"
    op = parts.add_parser("op", help=what, description=f"Measure {what}.")
    op.add_argument("--shape", nargs="+", metavar="BxNxC", help="batch, tokens, channels, such as 8x3136x96")
    op.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], metavar="D", help=", ".join(_DTYPES))
    op.add_argument("--accuracy", action="store_true", help="measure errors against eq. 9 in float64 instead of times")
    paths = [path for path in accuracy.PATHS if path != "triton"]
    op.add_argument(
        "--path", nargs="+", default=paths, metavar="P", help=f"with --accuracy: {', '.join(accuracy.PATHS)}"
    )
    what = "networks: images/s, multiply-adds/s, memory"
    model = parts.add_parser("model", help=what, description=f"Measure {what}.")
    model.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="names, runs or checkpoints of classifiers (default: sola_tiny sola_small)",
    )
    model.add_argument(
        "--compare", nargs="*", default=list(COMPARED), metavar="NAME", help="timm networks or runs to compare with"
    )
    model.add_argument("--size", nargs="+", metavar="HxW", help=SIZE_HELP)
    model.add_argument("--batch-size", type=int, default=1, metavar="N", help="images at once")
    model.add_argument("--dtype", nargs="+", default=["float32"], metavar="D", help=", ".join(network.DTYPES))
    model.add_argument("--layout", nargs="+", default=["contiguous"], metavar="L", help=", ".join(network.LAYOUTS))
    model.add_argument("--train", action="store_true", help="training steps: forward, backward, fused AdamW")
    model.add_argument("--compile", action="store_true", help="also under torch.compile (takes minutes per network)")
    model.add_argument(
        "--no-memory", action="store_true", help="do not measure memory, which takes a process for each case"
    )
    model.add_argument("--plot", metavar="FILE", help="plot time and memory against resolution as a PNG")
    for part in (op, model):
        part.add_argument("--rounds", type=int, default=7, help="number of rounds")
        part.add_argument(
            "--threads", type=int, help=f"number of threads (default: torch's own, here {torch.get_num_threads()})"
        )
        part.add_argument(
            "--json",
            nargs="?",
            const="-",
            metavar="FILE",
            help="write the results as JSON; without FILE: print them as JSON",
        )
    return parser.parse_args(list(arguments))


def _check(options: Namespace) -> None:
    """Raise ValueError or OSError for wrong options before minutes of measuring."""
    check_minimum(options, rounds=1, threads=1)
    _check_choices("--dtype", options.dtype, network.DTYPES if options.what == "model" else tuple(_DTYPES))
    if options.what == "model":
        check_minimum(options, batch_size=1)
        _check_choices("--layout", options.layout, network.LAYOUTS)
    else:
        _check_choices("--path", options.path, accuracy.PATHS)
    for file in (options.json, getattr(options, "plot", None)):
        check_parent_folder(None if file == "-" else file)


def _check_choices(name: str, values: Sequence[str], all_values: Sequence[str]) -> None:
    for value in values:
        if value not in all_values:
            raise ValueError(f"{name} {value!r} is unknown: choose from {', '.join(all_values)}")


def _shapes(options: Namespace, default: tuple[operator.Shape, ...]) -> tuple[operator.Shape, ...]:
    return tuple(map(parse_shape, options.shape)) if options.shape else default


def parse_shape(text: str) -> operator.Shape:
    """Parse "8x3136x96" as (batch, tokens, channels)."""
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--shape {text!r} must be BATCHxTOKENSxCHANNELS, such as 8x3136x96")
    batch, tokens, channels = map(int, parts)
    return batch, tokens, channels


def _operator(options: Namespace) -> None:
    protocol = replace(_OPERATOR, rounds=options.rounds)
    shapes, dtypes = _shapes(options, operator.SHAPES), tuple(_DTYPES[name] for name in options.dtype)
    document = _document("operator", protocol) | operator.measure(shapes, dtypes, protocol, _progress)
    if _write_json(options, document):
        return
    for direction in ("forward", "backward", "both"):
        rows = [row for row in document["rows"] if row["direction"] == direction]
        columns = {c: key for c, key in _COLUMNS.items() if key in {(row["path"], row["data"]) for row in rows}}
        table = new_table(f"{direction}, microseconds (spread %)", "shape", "dtype", *columns)
        for shape in shapes:
            for name in options.dtype:
                cells = {
                    (row["path"], row["data"]): f"{row['microseconds']:,.0f} ({100 * row['spread']:.0f})"
                    for row in rows
                    if (row["shape"], row["dtype"]) == (shape, name)
                }
                table.add_row(operator.text(shape), name, *(cells.get(key, "") for key in columns.values()))
        if rows:  # only the kernel has a backward that can be measured alone
            show_table(table)
    table = new_table("ratios", "what", "shape", "dtype", "ratio", "spread %", "target", "met")
    for row in document["ratios"]:
        target = "" if row["target"] is None else f"{'>=' if row['at_least'] else '<='} {row['target']:g}"
        met = {None: "", True: "yes", False: "no"}[row["met"]]
        numbers = f"{row['value']:.2f}", f"{100 * row['spread']:.0f}"
        table.add_row(row["what"], operator.text(row["shape"]), row["dtype"], *numbers, target, met)
    show_table(table)
    print(_LEGEND)


def _accuracy(options: Namespace) -> None:
    shapes = _shapes(options, accuracy.SHAPES)
    document = _document("accuracy") | accuracy.measure(shapes, tuple(options.path), _progress)
    if _write_json(options, document):
        return
    limits = f"forward <= {accuracy.FORWARD_TARGET:g}, gradients <= {accuracy.GRADIENT_TARGET:g}"
    table = new_table(f"float32 against eq. 9 in float64; {limits}", "shape", "range", "path", "y", *"wukv", "met")
    for row in document["rows"]:
        numbers = [f"{value:.1e}" for value in (row["forward"], *row["gradients"].values())]
        met = "yes" if row["met"] else "no"
        table.add_row(operator.text(row["shape"]), row["range"], row["path"], *numbers, met)
    show_table(table)


def _model(options: Namespace) -> None:
    protocol = Protocol(rounds=options.rounds)
    models = [full_name(name) for name in options.models or ("sola_tiny", "sola_small")]
    compared = [name for name in map(full_name, options.compare) if name not in models]
    cases = network.plan(
        [*models, *compared],
        image_sizes(options.size, models),
        batch=options.batch_size,
        dtypes=options.dtype,
        layouts=options.layout,
        training=options.train,
        compiled=options.compile,
        report=_progress,
    )
    document = _document("network", protocol)
    document |= network.measure(cases, compared, protocol, with_memory=not options.no_memory, report=_progress)
    if options.plot:
        from sola_vision.bench.picture import draw

        draw(document["rows"], Path(options.plot))
    if not _write_json(options, document):
        _print_networks(document)


def _print_networks(document: dict[str, Any]) -> None:
    numbers = ("images/s", "spread %", "GMACs", "GMACs/s", "peak MiB", "added MiB")
    table = new_table(document["hardware"], "network", "size", "batch", "condition", *numbers)
    for row in document["rows"]:
        figures = (
            f"{row['images_per_second']:,.2f}",
            f"{100 * row['spread']:.1f}",
            f"{row['gmacs']:.3f}",
            f"{row['gmacs_per_second']:,.1f}",
            *("" if row.get(name) is None else f"{row[name]:,.0f}" for name in ("peak_mib", "added_mib")),
        )
        table.add_row(
            short_name(row["model"]),
            f"{row['height']}x{row['width']}",
            str(row["batch"]),
            network.condition(row),
            *figures,
        )
    show_table(table, 150)
    print("peak: peak memory of the process; added: its increase by the network, images and optimiser state.")
    if document["ratios"]:
        table = new_table("speed relative to the baseline", "network", "size", "condition", "baseline", *numbers[:4:3])
        for row in document["ratios"]:
            ratios = f"{row['images_per_second']:.2f}", f"{row['gmacs_per_second']:.2f}"
            table.add_row(
                short_name(row["model"]),
                f"{row['height']}x{row['width']}",
                network.condition(row),
                short_name(row["baseline"]),
                *ratios,
            )
        show_table(table, 150)


def _document(what: str, protocol: Protocol | None = None) -> dict[str, Any]:
    from sola_vision.ops import cpu

    where = surroundings(torch.device("cpu"), processes=1)
    for name in ("peak_memory_mib", "processes"):  # those of this process, which are not measured here
        del where[name]
    kernel = cpu.instruction_set() if cpu.load() is None else None
    capability = torch.backends.cpu.get_cpu_capability()
    document = {"what": what, **where, "cpus": os.cpu_count(), "kernel": kernel, "torch_instructions": capability}
    return document | ({"protocol": asdict(protocol)} if protocol is not None else {})


def _write_json(options: Namespace, document: dict[str, Any]) -> bool:
    """Write or print JSON according to --json; return True if it replaces the tables."""
    if options.json is None:
        return False
    if options.json == "-":
        print(json_text(document))
        return True
    write_json(Path(options.json), document)
    return False


def _progress(line: str) -> None:
    print(f"sola: {line}", file=sys.stderr, flush=True)
