# SPDX-License-Identifier: Apache-2.0
"""The tables of README.md and docs/performance*.md, from the stored results.

    python benchmarks/report.py                              # print all tables as Markdown
    python benchmarks/report.py --write README.md docs/performance*.md    # replace them there

A table is placed between `<!-- table: NAME -->` and `<!-- end -->`.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from measures import (
    ACCURACY,
    CONVNEXT,
    DEIT_SMALL,
    RESULTS,
    SMALL,
    SWIN,
    Results,
    gpu_measures,
    load,
    measures,
    ratios,
    short,
)

_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
# folders of other machines' results -> their processors, which report the same name
OTHER_MACHINES = {"zen4": "Zen 4", "zen5": "Zen 5"}
# name of a result -> the part of cpu.py that measures it
_PARTS = {
    "operator": "operator",
    "operator_accuracy": "accuracy",
    "network_224_f32": "network224",
    "network_224_bf16": "network224",
    "network_1024": "network1024",
    "growth": "growth",
    "training": "training",
    "compiled_224": "compiled",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--write", type=Path, nargs="+", metavar="FILE", help="fill the tables of these pages")
    options = parser.parse_args()
    results = load(options.results)
    if options.write is None:
        for name, table in TABLES.items():
            print(f"## {name}\n\n{table(results)}\n")
    else:
        for page in options.write:
            page.write_text(filled(page.read_text(), results))
    return 0


def filled(page: str, results: Results) -> str:
    """Return the page with every table between its marks replaced."""

    def table(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"unknown table {name!r}; the tables are {', '.join(TABLES)}")
        return f"{begin}\n{TABLES[name](results)}\n\n{end}"

    return _MARKED.sub(table, page)


def measures_table(results: Results) -> str:
    """Format the measures of all machines side by side; cells without a measurement are empty."""
    machines = [(results, ""), *((results.get(name, {}), what) for name, what in OTHER_MACHINES.items())]
    columns = [{m.what: m for m in measures(found) if m.value is not None} for found, _ in machines]
    targets = {m.what: m.target_shown for m in measures(results)}
    for column in columns:
        targets |= {what: m.target_shown for what, m in column.items()}
    rows = []
    for what, target in targets.items():
        found = (column.get(what) for column in columns)
        cells = (cell for m in found for cell in (("", "") if m is None else (m.shown, m.verdict)))
        rows.append((what, target, *cells))
    head = (cell for machine in machines for cell in (hardware(*machine), "met"))
    return markdown(("measure", "target", *head), rows)


def hardware(results: Results, processor: str) -> str:
    document = results.get("operator", {})
    what = f"{document.get('hardware', 'none')}, {document.get('kernel', 'no kernel')}"
    return f"{processor}: {what}" if processor else what


def speed_table(results: Results) -> str:
    """Format images per second of sola_small over those of others, one column per machine."""
    conditions = {
        "224, float32": ("network_224_f32", (SWIN, CONVNEXT, DEIT_SMALL)),
        "224, bfloat16": ("network_224_bf16", (SWIN, CONVNEXT, DEIT_SMALL)),
        "1024, float32": ("network_1024", (SWIN, DEIT_SMALL)),
        "224, training": ("", (SWIN, CONVNEXT, DEIT_SMALL)),
    }
    machines = {"Intel Xeon, AMX": results} | {what: results.get(name, {}) for name, what in OTHER_MACHINES.items()}
    card = {
        (row["model"], row["direction"]): row["images_per_second"]
        for row in results.get("gpu-models", {}).get("rows", [])
    }
    ways = {"224, bfloat16": "inference", "224, training": "training"}  # of the card
    rows = []
    for condition, (source, others) in conditions.items():
        for other in others:
            found = [ratios(machine, source)(SMALL, other) for machine in machines.values()]
            ours, baseline = (card.get((name, ways.get(condition, ""))) for name in (SMALL, other))
            found.append(ours / baseline if ours and baseline else None)
            cells = ("" if value is None else f"{value:.2f}" for value in found)
            rows.append((condition, f"`{short(other)}`", *cells))
    return markdown(("size", "over", *machines, "H200"), rows)


def startup_table(results: Results) -> str:
    document = results.get("startup")
    if document is None:
        return "*Not measured yet:* `python benchmarks/startup.py`"
    rows = [(what, f"{seconds:.2f} s") for what, seconds in document["seconds"].items()]
    where = (
        f"{document['hardware']}, torch {document['torch']}, timm {document['timm']}, commit {document['commit'][:10]}"
    )
    return markdown(("process", "time"), rows) + f"\n\n{where}: `python benchmarks/startup.py`"


def products_table(results: Results) -> str:
    document = results.get("zen5", {}).get("products")  # the machine on which the choice matters
    if document is None:
        return "*Not measured yet:* `python benchmarks/products.py`"
    rows = []
    for row in document["rows"]:
        rates = (f"{row['gmacs_per_second'][way]:,.0f}" for way in ("matrices", "convolution"))
        faster = f"{row['convolution_over_matrices']['ratio']:.2f}"
        rows.append((str(row["threads"]), "x".join(map(str, row["shape"])), row["what"], *rates, faster))
    head = ("threads", "rows x inner x outer", "what", "matrices, GMACs/s", "convolution, GMACs/s", "times as fast")
    where = f"{document['hardware']}, torch {document['torch']}, commit {document['commit'][:10]}"
    return markdown(head, rows) + f"\n\n{where}: `python benchmarks/products.py`"


def operator_table(results: Results) -> str:
    document = results.get("operator")
    if document is None:
        return missing("operator")
    columns = {
        "forward": ("native", "forward", "repeated"),
        "streamed": ("native", "forward", "streamed"),
        "backward": ("native", "backward", "repeated"),
        "both": ("native", "both", "repeated"),
        "portable, both": ("portable", "both", "repeated"),
        "attention, forward": ("attention", "forward", "repeated"),
        "attention, both": ("attention", "both", "repeated"),
        "k + v": ("copy", "forward", "repeated"),
        "k + v, streamed": ("copy", "forward", "streamed"),
    }
    cells: dict[tuple[str, str], dict[Any, str]] = {}
    for row in document["rows"]:
        line = cells.setdefault(("x".join(map(str, row["shape"])), row["dtype"]), {})
        line[row["path"], row["direction"], row["data"]] = f"{row['microseconds']:,.0f}"
    rows = [(*key, *(line.get(name, "") for name in columns.values())) for key, line in cells.items()]
    return markdown(("shape BxNxC", "dtype", *columns), rows) + "\n\n" + provenance(document)


def accuracy_table(results: Results) -> str:
    documents = [results[name] for name in ACCURACY if name in results]
    if not documents:
        return missing("operator_accuracy")
    worst: dict[tuple[str, str, str], list[float]] = {}
    for row in (row for document in documents for row in document["rows"]):
        key = ("x".join(map(str, row["shape"])), row["path"], row["referee"])
        errors = [row["forward"], *row["gradients"].values()]
        worst[key] = list(map(max, errors, worst.get(key, errors)))
    rows = [(*key, *(f"{value:.1e}" for value in errors)) for key, errors in worst.items()]
    head = ("shape BxNxC", "path", "referee", "y", "gw", "gu", "gk", "gv")
    sources = "\n\n".join(provenance(document) for document in documents)
    return markdown(head, rows) + "\n\nThe worst of all ranges. " + sources


def network_table(name: str) -> Callable[[Results], str]:
    def table(results: Results) -> str:
        document = results.get(name)
        if document is None:
            return missing(name)
        with_memory = any(row.get("peak_mib") for row in document["rows"])
        rows = []
        for row in document["rows"]:
            condition = " ".join(
                filter(None, (row["dtype"], "compiled" * row["compiled"], row["layout"].replace("contiguous", "")))
            )
            line = [row["model"], f"{row['height']}x{row['width']}", str(row["batch"]), condition]
            line += [f"{row['images_per_second']:,.2f}", f"{100 * row['spread']:.1f}"]
            line += [f"{row['gmacs']:.2f}", f"{row['gmacs_per_second']:,.1f}"]
            if with_memory:
                line += ["" if row.get(x) is None else f"{row[x]:,.0f}" for x in ("peak_mib", "added_mib")]
            rows.append(line)
        head = ["network", "size", "batch", "condition", "images/s", "spread %", "GMACs", "GMACs/s"]
        head += ["peak MiB", "added MiB"] if with_memory else []
        return markdown(head, rows) + "\n\n" + provenance(document)

    return table


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def attention_table(results: Results) -> str:
    document = results.get("attention")
    if document is None:
        return "*Not measured yet:* `python benchmarks/attention.py`"
    rows = []
    for row in document["rows"]:
        rates = (f"{row['gmacs_per_second'][side]:,.0f}" for side in ("torch", "kernel"))
        faster = f"{row['torch_over_kernel']['ratio']:.2f}"
        rows.append(("x".join(map(str, row["shape"])), row["dtype"], row["what"], *rates, faster))
    head = ("images x tokens x heads", "dtype", "what", "torch, GMACs/s", "kernel, GMACs/s", "times as fast")
    where = f"{document['hardware']}, {document['threads']} threads, torch {document['torch']}"
    return markdown(head, rows) + f"\n\n{where}, commit {document['commit'][:10]}: `python benchmarks/attention.py`"


def gpu_measures_table(results: Results) -> str:
    rows = [(m.what, m.target_shown, m.shown, m.verdict) for m in gpu_measures(results)]
    where = {document["hardware"]: None for name, document in results.items() if name.startswith("gpu-")}
    return markdown(("measure", "target", ", ".join(where) or "no GPU yet", "met"), rows)


def gpu_operator_table(results: Results) -> str:
    document = results.get("gpu-operator")
    if document is None:
        return gpu_missing("operator")
    lines: dict[tuple[str, str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for row in (row for row in document["rows"] if row["what"] == "operator"):
        launch = "CUDA graph" if row["launch"] == "graph" else "eager"
        line = lines.setdefault(("x".join(map(str, row["shape"])), row["beside"], launch), {})
        line[row["path"], row["direction"]] = row
    columns = [(path, way) for path in ("triton", "vision-rwkv") for way in ("forward", "backward", "both")]
    columns += [(path, way) for path in ("sdpa", "portable") for way in ("forward", "both")]
    rows = []
    for key, line in lines.items():
        cells = []
        for name in columns:
            cells.append(f"{line[name]['microseconds']:,.1f}" if name in line else "")
            if name[0] == "triton" and name[1] != "both":
                cells.append(f"{line[name]['over_hbm_floor_measured']:.2f}" if name in line else "")
        rows.append((*key, *cells))
    names = {"triton": "", "vision-rwkv": "Vision-RWKV, ", "sdpa": "attention, ", "portable": "portable, "}
    head: list[str] = []
    for path, way in columns:
        head += [f"{names[path]}{way}", "over HBM's time"][: 2 if path == "triton" and way != "both" else 1]
    bandwidth = next(row["copy_tb_s"] for row in document["rows"] if row["what"] == "bandwidth")
    floor = f"HBM's time is that of 5 (backward 8) N C elements at the {bandwidth:.2f} TB/s of a large copy."
    table = markdown(("shape BxNxC", "dtype", "launch", *head), rows)
    return f"{table}\n\n{floor} Vision-RWKV's kernel has float32 only. {gpu_provenance(document)}"


def gpu_passes_table(results: Results) -> str:
    document = results.get("gpu-passes")
    if document is None:
        return gpu_missing("passes")
    lines: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in (row for row in document["rows"] if row["what"] == "pass"):
        lines.setdefault((row["name"], row["dtype"], row["direction"]), {})[row["path"]] = row
    rows = []
    for key, line in lines.items():
        cells = []
        for path in ("kernel", "portable"):
            row = line.get(path)
            cells += (
                ["", ""] if row is None else [f"{row['microseconds']:,.1f}", f"{row['over_hbm_floor_measured']:.2f}"]
            )
        rows.append((*key, *cells))
    head = ("pass", "dtype", "direction", "operator", "over HBM's time", "plain torch", "over HBM's time")
    return markdown(head, rows) + "\n\n" + gpu_provenance(document)


def gpu_models_table(results: Results) -> str:
    documents = [document for name, document in results.items() if name.startswith("gpu-models")]
    if not documents:
        return gpu_missing("models")
    lines: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in (row for document in documents for row in document["rows"]):
        key = (row["model"], f"{row['size']}x{row['size']}", str(row["batch"]), row["mode"])
        lines.setdefault(key, {})[row["direction"]] = row
    rows = []
    for key, line in lines.items():
        cells = []
        for row in (line.get(way) for way in ("inference", "training")):
            memory = None if row is None else row["peak_mib"]
            cells += [
                "" if row is None else f"{row['images_per_second']:,.0f}",
                "" if memory is None else f"{memory:,.0f}",
                "" if row is None else f"{100 * row['spread']:.1f}",
            ]
        rows.append((*key, *cells))
    head = ["network", "size", "batch", "mode"]
    for way in ("inference", "training"):
        head += [f"{way}, images/s", "MiB", "spread %"]
    return markdown(head, rows) + "\n\n" + "\n\n".join(gpu_provenance(document) for document in documents)


def gpu_profile_table(results: Results) -> str:
    """Format one line per call, with the three kernels that take longest."""
    document = results.get("gpu-profile")
    if document is None:
        return gpu_missing("profile")
    rows = []
    for row in document["rows"]:
        subject = row.get("model") or f"operator {'x'.join(map(str, row['shape']))} {row['dtype']}"
        most = "; ".join(f"{100 * k['share']:.0f} % `{kernel_name(k['name'])}`" for k in row["kernels"][:3])
        times = (f"{row[x]:,.0f}" for x in ("device_us", "wall_us", "launch_us", "launched"))
        rows.append((subject, row["direction"], *times, most))
    head = ("what", "direction", "device", "wall", "launching", "kernels", "most of the device's time")
    return markdown(head, rows) + "\n\n" + gpu_provenance(document)


def kernel_name(name: str) -> str:
    """Shorten a name for a cell, which a bar would end."""
    return name.replace("|", "/").replace("`", "'")[:40]


def gpu_missing(part: str) -> str:
    return f"*Not measured yet:* `python benchmarks/gpu.py {part}`"


def gpu_provenance(document: dict[str, Any]) -> str:
    versions = (
        f"torch {document['torch']}, CUDA {document['cuda']}, triton {document['triton']}, timm {document['timm']}"
    )
    commit = (document["commit"] or "unknown")[:10] + "+" * (document["commit"] or "").endswith("+")
    # without the paths of files, which do not matter
    command = re.sub(r" --(out|vision-rwkv|commit|minutes) \S+", "", document["command"])
    return f"{document['hardware']}, {versions}, commit {commit}: `python benchmarks/{command}`"


def missing(name: str) -> str:
    return f"*Not measured yet:* `python benchmarks/cpu.py --part {_PARTS[name]}`"


def provenance(document: dict[str, Any]) -> str:
    """Format hardware, versions, commit and command in one line."""
    rounds = f", {document['protocol']['rounds']} rounds" if "protocol" in document else ""
    commit = (document["commit"] or "unknown")[:10] + "+" * (document["commit"] or "").endswith("+")
    # without the path of the file, which does not matter
    command = re.sub(r" --json \S+", "", document["command"])
    where = f"{document['hardware']}, {document['threads']} threads, torch {document['torch']}, timm {document['timm']}"
    return f"{where}, commit {commit}, kernel {document['kernel']}{rounds}: `{command}`"


TABLES: dict[str, Callable[[Results], str]] = {
    "speed": speed_table,
    "measures": measures_table,
    "products": products_table,
    "attention": attention_table,
    "startup": startup_table,
    "operator": operator_table,
    "accuracy": accuracy_table,
    **{
        name: network_table(name)
        for name in ("network_224_f32", "network_224_bf16", "network_1024", "growth", "training", "compiled_224")
    },
    "gpu-measures": gpu_measures_table,
    "gpu-operator": gpu_operator_table,
    "gpu-passes": gpu_passes_table,
    "gpu-models": gpu_models_table,
    "gpu-profile": gpu_profile_table,
}

if __name__ == "__main__":
    sys.exit(main())
