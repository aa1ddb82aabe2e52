# SPDX-License-Identifier: Apache-2.0
"""The project's measures of speed and accuracy on CPU and GPU, and whether the stored results meet their targets.

A measure is a value in a result file, or computed from two of its rows, with a bound.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TINY, SMALL = "sola_tiny", "sola_small"
SWIN, EFFICIENT, CONVNEXT = "swin_tiny_patch4_window7_224", "efficientformer_l1", "convnext_tiny"
DEIT_TINY, DEIT_SMALL = "deit_tiny_patch16_224", "deit_small_patch16_224"
GPU_SHAPE = [128, 3136, 96]
ACCURACY = ("operator_accuracy", "operator_accuracy_triton", "operator_accuracy_triton_3136")
Results = dict[str, Any]  # name of the file -> its document; name of a folder -> another machine's results


@dataclass(frozen=True)
class Measure:
    """A value and its target. value: None if not measured yet. source: the result file, without .json."""

    what: str
    value: float | None
    target: float
    at_least: bool
    source: str
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        """True if the target is met; None without a value."""
        if self.value is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    @property
    def shown(self) -> str:
        """The value for a table."""
        return "-" if self.value is None else self._text(self.value)

    @property
    def target_shown(self) -> str:
        """The target for a table."""
        return f"{'>=' if self.at_least else '<='} {self._text(self.target)}"

    @property
    def verdict(self) -> str:
        """yes, NO or not measured."""
        return {None: "not measured", True: "yes", False: "NO"}[self.met]

    def _text(self, value: float) -> str:
        if self.unit == "":
            return f"{value:.1e}"
        return f"{value:.3g}{self.unit}" if value < 100 else f"{value:.0f}{self.unit}"


def load(folder: Path = RESULTS) -> Results:
    """Load the JSON files of a folder and, nested, those of its subfolders."""
    paths = sorted(folder.glob("*.json"), key=lambda path: path.stem)
    files = {path.stem: json.loads(path.read_text()) for path in paths}
    return files | {path.name: load(path) for path in sorted(folder.iterdir()) if path.is_dir()}


def add_out(parser: argparse.ArgumentParser) -> None:
    """Add --out; the folder is created, or an error reported, before anything is measured."""
    parser.add_argument("--out", type=_folder, default=RESULTS, help="folder of the JSON files")


def _folder(text: str) -> Path:
    try:
        Path(text).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be a folder: {error.strerror}; use another path") from error
    return Path(text)


def measures(results: Results) -> list[Measure]:
    """Return the measures on a CPU."""
    return [*_operator(results), *_accuracy(results), *_networks(results), *_growth(results), *_training(results)]


def gpu_measures(results: Results) -> list[Measure]:
    """Return the measures on a GPU, which `gpu.py` measures."""
    return [*_gpu_operator(results), *_gpu_networks(results)]


def listing(found: list[Measure]) -> str:
    """Format the measures as a text table, one per line."""
    width = max(len(measure.what) for measure in found)
    lines = [f"{'measure':<{width}}  {'value':>10}  {'target':>10}  met"]
    lines += [f"{m.what:<{width}}  {m.shown:>10}  {m.target_shown:>10}  {m.verdict}" for m in found]
    return "\n".join(lines)


def _operator(results: Results) -> Iterator[Measure]:
    ratios = [row for row in results.get("operator", {}).get("ratios", []) if row["target"] is not None]
    for row in ratios:
        shape = "x".join(map(str, row["shape"]))
        what = f"operator: {row['what']}, {shape} {row['dtype']}"
        yield Measure(what, row["value"], row["target"], row["at_least"], "operator")
    if not ratios:
        for what, target, at_least in (
            ("forward over a copy, in cache", 4.0, False),
            ("forward over a copy, streamed", 2.5, False),
            ("backward over forward", 2.2, False),
            ("attention over forward, 3136 tokens", 120.0, True),
            ("attention over both, 3136 tokens", 100.0, True),
        ):
            yield Measure(f"operator: {what}", None, target, at_least, "operator")


def _accuracy(results: Results) -> Iterator[Measure]:
    for source in ACCURACY:
        rows = results.get(source, {}).get("rows", [])
        usual = source.removeprefix("operator_accuracy").removeprefix("_").replace("_", ", ") or "every path"
        paths = list(dict.fromkeys(row["path"] for row in rows)) or [usual]
        for path in paths:
            path_rows = [row for row in rows if row["path"] == path]
            forward = max((row["forward"] for row in path_rows), default=None)
            gradient = max((max(row["gradients"].values()) for row in path_rows), default=None)
            label = usual if path in usual else path
            yield Measure(f"accuracy: forward, {label}", forward, 5e-6, False, source, unit="")
            yield Measure(f"accuracy: gradients, {label}", gradient, 1e-5, False, source, unit="")


def _networks(results: Results) -> Iterator[Measure]:
    for source, dtype in (("network_224_f32", "float32"), ("network_224_bf16", "bfloat16")):
        find = ratios(results, source, dtype=dtype)
        rate = "gmacs_per_second"
        for model, baseline in ((TINY, DEIT_TINY), (SMALL, DEIT_SMALL)):
            what = f"224 {dtype}: multiply-add rate, {model} over {short(baseline)}"
            yield Measure(what, find(model, baseline, rate), 0.9, True, source)
        # channels last makes some convolutional networks twice as fast, so both layouts are compared
        for model, baseline, target in (
            (SMALL, SWIN, 1.5),
            (SMALL, CONVNEXT, 1.0),
            (TINY, EFFICIENT, 0.9 if dtype == "float32" else 1.4),
        ):
            for layout, words in (("contiguous", ""), ("fastest", ", each in its faster layout")):
                what = f"224 {dtype}: images/s, {model} over {short(baseline)}{words}"
                yield Measure(what, find(model, baseline, layout=layout), target, True, source)
    find = ratios(results, "network_1024", dtype="float32")
    for model, baseline, target in ((SMALL, DEIT_SMALL, 1.7), (SMALL, SWIN, 1.6), (TINY, DEIT_TINY, 1.5)):
        what = f"1024 float32: images/s, {model} over {short(baseline)}"
        yield Measure(what, find(model, baseline), target, True, "network_1024")


def _growth(results: Results) -> Iterator[Measure]:
    rows = {row["height"]: row for row in results.get("growth", {}).get("rows", []) if row["model"] == TINY}
    for small, large in ((512, 1024), (1024, 2048)):
        value = None
        if small in rows and large in rows:
            time, macs = (rows[large][name] / rows[small][name] for name in ("seconds", "gmacs"))
            value = time / macs
        yield Measure(f"growth: time over MACs, {TINY}, {small} to {large}", value, 1.15, False, "growth")
    peak = rows.get(2048, {}).get("peak_mib")
    value = None if peak is None else peak * 2**20 / 1e9
    yield Measure(f"growth: peak memory of the process, {TINY}, 2048", value, 3.0, False, "growth", unit=" GB")


def _training(results: Results) -> Iterator[Measure]:
    rate = ratios(results, "training", dtype="float32")(TINY, DEIT_TINY, "gmacs_per_second")
    yield Measure("training step: multiply-add rate, sola_tiny over deit_tiny", rate, 0.9, True, "training")
    rows = {row["model"]: row.get("added_mib") for row in results.get("training", {}).get("rows", [])}
    both = rows.get(TINY), rows.get(DEIT_TINY)
    memory = both[0] / both[1] if both[0] and both[1] else None
    yield Measure("training step: memory, sola_tiny over deit_tiny", memory, 2.3, False, "training")


def _gpu_operator(results: Results) -> Iterator[Measure]:
    source = "gpu-operator"
    rows = {
        (row["path"], row["direction"], row["beside"]): row
        for row in results.get(source, {}).get("rows", [])
        if row["what"] == "operator" and row["shape"] == GPU_SHAPE and row["launch"] == "eager"
    }
    of = "x".join(map(str, GPU_SHAPE))
    for direction, target in (("forward", 1.3), ("backward", 1.5)):
        value = rows.get(("triton", direction, "bfloat16"), {}).get("over_hbm_floor_measured")
        yield Measure(f"operator: {direction} over HBM's time, {of} bfloat16", value, target, False, source)
    # Vision-RWKV's kernel supports float32 only, ours runs in autocast's dtype; the operator's table has it in float32
    for direction in ("forward", "both"):
        ours, other = (rows.get((path, direction, "bfloat16")) for path in ("triton", "vision-rwkv"))
        value = other["microseconds"] / ours["microseconds"] if ours and other else None
        what = f"operator: Vision-RWKV's CUDA kernel (float32) over {direction}, {of} bfloat16"
        yield Measure(what, value, 5.0, True, source)


def _gpu_networks(results: Results) -> Iterator[Measure]:
    source = "gpu-models"
    rates = {
        (row["model"], row["direction"]): row["images_per_second"] for row in results.get(source, {}).get("rows", [])
    }
    for direction in ("inference", "training"):
        ours, baseline = (rates.get((name, direction)) for name in (SMALL, SWIN))
        value = ours / baseline if ours and baseline else None
        yield Measure(f"224 autocast: images/s in {direction}, {SMALL} over {short(SWIN)}", value, 1.3, True, source)


def ratios(results: Results, source: str, **condition: Any) -> Callable[..., float | None]:
    """Return a function that looks up the ratio of a model to a baseline in a result file."""
    rows = results.get(source, {}).get("ratios", [])

    def find(
        model: str, baseline: str, quantity: str = "images_per_second", layout: str = "contiguous"
    ) -> float | None:
        wanted = condition | {"model": model, "baseline": baseline, "compiled": False, "layout": layout}
        found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
        return found[0][quantity] if found else None

    return find


def short(name: str) -> str:
    """Return a timm name without patch and window sizes."""
    return name.partition("_patch")[0]
