# SPDX-License-Identifier: Apache-2.0
"""Export of networks to other programs: ONNX, torch.export archives, AOTInductor packages.

`networks.py` defines the outputs of a network, `trace.py` traces it for images of any size, `graph.py` and `wkv.py`
write ONNX's standard operators, `archive.py` torch's own files. `export` runs all of it and compares the file with the
network before it is kept.
"""

import errno
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal, get_args

from sola_vision.export import archive, check, graph
from sola_vision.export.check import Comparison
from sola_vision.export.networks import Exportable, classifier, detector_pyramid, features, segmenter

__all__ = [
    "Comparison",
    "Exportable",
    "Format",
    "Precision",
    "Report",
    "classifier",
    "detector_pyramid",
    "export",
    "features",
    "segmenter",
]

Format = Literal["onnx", "torch-export", "aoti"]
Precision = Literal["float32", "float16", "int8"]

# largest difference over largest value; below float32 the precision differs, not the graph
TOLERANCE: dict[str, float] = {"float32": 1e-4, "float16": 3e-2, "int8": 0.2}


_STEPS = {
    "onnx": "tracing the network and translating it to ONNX, which can take more than a minute",
    "torch-export": "tracing the network",
    "aoti": "tracing and compiling the network, which can take minutes",
}


@dataclass(frozen=True)
class Report:
    """An exported file and how it compares with the network; `ok` if every comparison is within `tolerance`."""

    path: str
    format: str
    precision: str
    bytes: int
    outputs: dict[str, str]
    comparisons: list[Comparison]
    tolerance: float
    operators: dict[str, int] = field(default_factory=dict)  # of an ONNX file: the number of nodes of each
    needs: str = ""

    @property
    def ok(self) -> bool:
        """True if every comparison is within the tolerance."""
        return all(comparison.error <= self.tolerance for comparison in self.comparisons)


def export(
    network: Exportable,
    path: str | Path,
    format: Format = "onnx",
    *,
    precision: Precision = "float32",
    sizes: Sequence[tuple[int, int]] = ((224, 224), (97, 131)),
    batches: Sequence[int] = (1, 3),
    metadata: Mapping[str, str] | None = None,
    report_progress: Callable[[str], None] = lambda line: None,
) -> Report:
    """Write the network to `path` and compare it with PyTorch on images of all `sizes` (height, width) and `batches`.

    A file that differs by more than the tolerance is not kept (`report.ok` is False), and an existing file stays.
    `report_progress` is called with a line at the start of each step.
    Raises ValueError for incompatible arguments, OSError if the file cannot be written, ImportError for packages that
    are not installed.
    """
    path = Path(path)
    _check_arguments(path, format, precision)
    draft = _create_draft(path)
    try:
        operators: dict[str, int] = {}
        report_progress(_STEPS[format])
        if format == "onnx":
            operators = graph.write(network, draft, precision, metadata or {})
            run = graph.session(draft)
        elif format == "torch-export":
            archive.save(network, draft, metadata or {})
            run = archive.load(draft)
        else:
            archive.compile_package(network, draft, metadata or {})
            run = archive.load_package(draft)
        comparisons = []
        cases = list(product(sizes, batches))
        for number, (size, batch) in enumerate(cases, 1):
            report_progress(
                f"comparing with PyTorch, {number} of {len(cases)}: batch {batch} of {size[0]}x{size[1]} images"
            )
            comparisons.append(check.compare(network, run, batch, size))
        report = Report(
            str(path),
            format,
            precision,
            draft.stat().st_size,
            network.outputs,
            comparisons,
            TOLERANCE[precision],
            operators,
            archive.needs(format),
        )
        if report.ok:
            os.replace(draft, path)
        return report
    finally:
        draft.unlink(missing_ok=True)


def _check_arguments(path: Path, format: str, precision: str) -> None:
    if format not in get_args(Format):
        raise ValueError(f"format {format!r} is unknown: choose from {', '.join(get_args(Format))}")
    suffix = ".onnx" if format == "onnx" else ".pt2"
    if path.suffix != suffix:
        raise ValueError(f"{path}: a file of format {format} must be named *{suffix}")
    if precision not in get_args(Precision):
        raise ValueError(f"precision {precision!r} is unknown: choose from {', '.join(get_args(Precision))}")
    if precision != "float32" and format != "onnx":
        raise ValueError(f"precision {precision}: format {format} supports float32 only; use onnx")
    if format == "onnx":
        graph.check_packages()


def _create_draft(path: Path) -> Path:
    """Create an empty file next to `path`, so that a path that cannot be written fails before the work."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    draft = path.with_name(f".new-{path.name}")
    try:
        draft.touch()
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None  # with the requested path
    return draft
