# SPDX-License-Identifier: Apache-2.0
"""`sola cost sola_tiny --size 224 512 1333x800`: parameters, multiply-adds and activation memory, before training.

Counted on meta tensors: nothing is computed, so any size takes about a second. Sizes are HEIGHTxWIDTH, or one number.
MODEL is a name, or the path of a classifier's run or checkpoint, which is counted with its bridges and classes.
"""

import json
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sola_vision.analysis.cost import Cost, Group, build, count
from sola_vision.analysis.paper import Compared, compare_with_paper
from sola_vision.commands.arguments import Arguments, check_minimum, check_parent_folder, plain
from sola_vision.commands.networks import SIZE_HELP, full_name, image_sizes, short_name
from sola_vision.commands.results import write_csv
from sola_vision.commands.tables import new_table, show_table
from sola_vision.tasks import describe_classifier

_MULTIPLE = 32  # sides are rounded up to it for timm networks that do not take the given size


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = _parse(arguments)
    if options.figure_1b:
        _figure_1b(options)
    elif options.paper:
        _paper(options)
    else:
        _networks(options)


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = Arguments("sola cost", __doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="sola_tiny, sola_base, ..., a run's folder or best.safetensors (default: sola_tiny)",
    )
    parser.add_argument("--size", nargs="+", metavar="HxW", help=SIZE_HELP)
    parser.add_argument("--schedule", help="layers of every stage, such as LL/LL/LLLLLL/LL")
    parser.add_argument("--bridges", help='Hidden State Bridges, such as "1.2>3.3", or the word paper')
    parser.add_argument(
        "--classes",
        type=int,
        help="outputs of the head, 0 for the backbone alone (default: those of the run or checkpoint, 1000 for a name)",
    )
    parser.add_argument("--batch", type=int, default=1, help="batch size of the activation memory")
    parser.add_argument(
        "--compare", nargs="+", default=[], metavar="NAME", help="timm networks or runs to compare with"
    )
    parser.add_argument(
        "--by",
        choices=("network", "stage", "layer", "operator"),
        default="network",
        help="what one row of the table describes",
    )
    parser.add_argument("--paper", action="store_true", help="compare with the cost columns of the paper's tables")
    parser.add_argument("--figure-1b", action="store_true", help="Figure 1(b): MACs from 16 to 1280 pixels a side")
    parser.add_argument(
        "--measure", action="store_true", help="with --figure-1b: also measure time and memory (takes minutes)"
    )
    parser.add_argument("--threads", type=int, default=2, help="with --measure: number of threads")
    parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    parser.add_argument(
        "--csv", metavar="FILE", help="write the most detailed rows as CSV (or the table, or the points of the figure)"
    )
    parser.add_argument("--plot", metavar="FILE", help="plot MACs and memory against size, or Figure 1(b), as a PNG")
    options = parser.parse_args(list(arguments))
    check_minimum(options, classes=0, batch=1, threads=1)
    if options.measure and not options.figure_1b:
        raise ValueError("--measure needs --figure-1b: add it")
    fixed = "--figure-1b" if options.figure_1b else "--paper"
    if options.paper or options.figure_1b:
        names = ("models", "size", "schedule", "bridges", "classes", "compare")
        for name in (name for name in names if getattr(options, name) not in (None, [])):
            given = "the networks" if name == "models" else f"--{name}"
            raise ValueError(f"{fixed} counts the paper's networks at the paper's sizes: leave out {given}")
    for file in (options.csv, options.plot):
        check_parent_folder(file)
    return options


def _networks(options: Namespace) -> None:
    changes = {name: getattr(options, name) for name in ("schedule", "bridges") if getattr(options, name) is not None}
    models = [full_name(name) for name in options.models or ["sola_tiny"]]
    for name in models:
        if changes and Path(name).exists():
            raise ValueError(f"--{next(iter(changes))} needs the name of a network: {name} defines its own")
        if changes and not name.startswith("sola_"):
            raise ValueError(f"{name} has no {' and no '.join(changes)}: pass it to --compare, or leave these out")
    sizes = image_sizes(options.size, models)
    own = [(name, _count(name, size, options, changes)) for name in models for size in sizes]
    compared = [
        cost
        for name in map(full_name, options.compare)
        for size in sizes
        if (cost := _count_compared(name, size, options))
    ]
    costs = [cost for _, cost in own] + compared
    if options.csv:
        write_csv(options.csv, [_row(cost, row) for cost in costs for row in cost.rows])
    if options.plot:
        from sola_vision.analysis.figures import draw_costs

        draw_costs(costs, Path(options.plot))
    if options.json:
        documents = [_document(cost, {"model": name} | changes) for name, cost in own]
        print(json.dumps([*documents, *(_document(cost, {}) for cost in compared)], indent=2))
    else:
        _print(costs, options.by)


def _count(model: str, size: tuple[int, int], options: Namespace, changes: dict[str, Any]) -> Cost:
    name, classes, label = model, 1000, " ".join(filter(None, [model, *changes.values()]))
    if Path(model).exists():
        described = describe_classifier(model)
        name, classes, changes = described.name, described.num_classes, described.arguments
    if options.classes is not None:
        classes = options.classes
    return count(build(name, size, classes, **changes), size, options.batch, name=label)


def _count_compared(name: str, size: tuple[int, int], options: Namespace) -> Cost | None:
    """Count a timm network at this size or the next multiple of 32; None, with a line on stderr, if neither fits."""
    try:
        return _count(name, size, options, {})
    except ValueError as error:
        rounded = tuple(-(-side // _MULTIPLE) * _MULTIPLE for side in size)
        try:
            cost = _count(name, (rounded[0], rounded[1]), options, {})
        except ValueError:
            print(f"sola: skipped: {error}", file=sys.stderr)
            return None
        print(f"sola: {name} is counted at {rounded[0]}x{rounded[1]}: {error}", file=sys.stderr)
        return cost


def _row(cost: Cost, row: Any) -> dict[str, Any]:
    return {"model": cost.model, "height": cost.height, "width": cost.width, "batch": cost.batch} | asdict(row)


def _document(cost: Cost, changes: dict[str, Any]) -> dict[str, Any]:
    document = asdict(replace(cost, rows=())) | changes
    document.pop("rows")
    for name in ("stages", "layers", "operators"):
        document[name] = [asdict(group) for group in getattr(cost, name)]
    return document


def _print(costs: list[Cost], by: str) -> None:
    if by == "network":
        table = new_table(None, "network", "size", "parameters", "GMACs", "inference MiB", "training MiB")
        for c in costs:
            numbers = (f"{c.parameters:,}", f"{c.gmacs:.3f}", _mebibytes(c.peak_bytes), _mebibytes(c.saved_bytes))
            table.add_row(short_name(c.model), f"{c.height}x{c.width}", *numbers)
        show_table(table)
    else:
        for c in costs:
            title = plain(f"{short_name(c.model)} at {c.height}x{c.width}")
            table = new_table(title, by, "parameters", "GMACs", "%", "training MiB")
            groups: list[Group] = getattr(c, f"{by}s")
            for g in [*groups, Group("total", c.parameters, c.macs, c.saved_bytes)]:
                share = 100 * g.macs / max(1, c.macs)
                numbers = (f"{g.parameters:,}", f"{g.macs / 1e9:.4f}", f"{share:.1f}", _mebibytes(g.saved_bytes))
                table.add_row(g.name, *numbers, end_section=g is groups[-1])
            show_table(table)
    print("MACs are multiply-adds, which papers call FLOPs; MiB are of activations, without the weights and the image.")


def _paper(options: Namespace) -> None:
    rows = list(compare_with_paper())
    listed = [_paper_row(row) for row in rows]
    if options.csv:
        write_csv(options.csv, listed)
    if options.json:
        print(json.dumps(listed, indent=2))
        return
    titles = {"1": "512x512", "3": "224x224", "4": "1333x800", "5": "512x512", "7": "224x224", "8": "512x512"}
    for number, size in titles.items():
        columns = ("GMACs, paper", "here", "%", "M parameters, paper", "here", "%")
        table = new_table(f"Table {number} ({size})", "network", *columns)
        for row in rows:
            if row.paper.table == number:
                macs = _number(row.paper.gmacs, 2), _number(row.gmacs, 2), _signed(row.gmacs_difference)
                parameters = _number(row.paper.params, 2), _number(row.params, 2), _signed(row.params_difference)
                table.add_row(row.paper.method, *macs, *parameters)
        show_table(table)
    print("The paper's FLOPs are multiply-adds (MACs). SoLA is counted without its head, the other networks with it.")
    print(
        "A dash: the paper has no number, or neither timm nor this package has the network (in Tables 4 and 5 ViT and "
        "VRWKV include an adapter)."
    )


def _paper_row(row: Compared) -> dict[str, Any]:
    return {
        "table": row.paper.table,
        "method": row.paper.method,
        "height": row.paper.size[0],
        "width": row.paper.size[1],
        "model": row.paper.model,
        "paper_gmacs": row.paper.gmacs,
        "gmacs": row.gmacs,
        "gmacs_difference_percent": row.gmacs_difference,
        "paper_mparams": row.paper.params,
        "mparams": row.params,
        "mparams_difference_percent": row.params_difference,
    }


def _figure_1b(options: Namespace) -> None:
    from sola_vision.analysis.figures import draw_scaling
    from sola_vision.analysis.scaling import Point, counted, measured

    points = list(counted())
    if options.measure:

        def report(point: Point) -> None:
            if point.seconds is not None:
                print(
                    f"{point.network} {point.size}: {point.seconds:.3f} s, {point.mebibytes:.0f} MiB", file=sys.stderr
                )

        points = measured(points, options.threads, report)
    listed = [asdict(point) for point in points]
    if options.csv:
        write_csv(options.csv, listed)
    if options.plot:
        draw_scaling(points, Path(options.plot))
    if options.json:
        print(json.dumps(listed, indent=2))
    else:
        networks = list(dict.fromkeys(point.network for point in points))
        table = new_table("Figure 1(b): GMACs without heads", "side", *networks)
        for size in dict.fromkeys(point.size for point in points):
            by_network = {p.network: p for p in points if p.size == size}
            table.add_row(str(size), *(f"{by_network[n].gmacs:,.2f}" for n in networks))
        show_table(table)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}"
