# SPDX-License-Identifier: Apache-2.0
"""`sola export CHECKPOINT-OR-NAME --format onnx --out FILE`: export a network for other programs.

The outputs are the logits of a classifier, the logits of every pixel of a segmentation network, or the backbone's
feature pyramid of a detector; with --features the maps of a classifier's stages. Every format takes images of any size
and number. The file is compared with PyTorch before it is kept.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import timm
import torch

from sola_vision.commands.arguments import Arguments, check_minimum, parse_size
from sola_vision.commands.tables import new_table, show_table
from sola_vision.data import EvalTransform, ImageConfig
from sola_vision.engine.log import json_text
from sola_vision.export import Exportable, Format, Precision, Report, classifier, detector_pyramid, export, segmenter
from sola_vision.export import features as feature_maps
from sola_vision.tasks import ModelConfig, build_model, load_checkpoint, read_description, takes_one_size
from sola_vision.wording import amount


def run(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    options = _parse(arguments)
    network, size, metadata = _network(options)
    sizes = [parse_size(text, "--check") for text in options.check] if options.check else _sizes(network, size)
    report = export(
        network,
        options.out,
        options.format,
        precision=options.precision,
        sizes=sizes,
        batches=options.batch,
        metadata=metadata,
        report_progress=lambda line: print(f"sola: {line}", file=sys.stderr, flush=True),
    )
    if options.json:
        print(json_text(asdict(report) | {"ok": report.ok}))
    else:
        _print(report)
    if not report.ok:
        worst = max(report.comparisons, key=lambda comparison: comparison.error)
        print(
            f"sola: {options.out} was not written: at {worst.height}x{worst.width} its outputs differ by "
            f"{worst.error:.1e}, more than the tolerance {report.tolerance:g} of {report.precision}",
            file=sys.stderr,
        )
    return 0 if report.ok else 1


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = Arguments("sola export", __doc__)
    parser.add_argument("source", metavar="CHECKPOINT-OR-NAME", help="a checkpoint, a run's folder, or sola_tiny, ...")
    parser.add_argument("--format", required=True, choices=get_args(Format), help="file format")
    parser.add_argument(
        "--out", required=True, metavar="FILE", help="file to write: *.onnx, or *.pt2 for the other two formats"
    )
    parser.add_argument("--features", action="store_true", help="feature maps instead of a classifier's logits")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        default="float32",
        help="precision of the weights, onnx only",
    )
    parser.add_argument("--schedule", help="with a name: layers of every stage, such as LL/LL/LLLLLL/LL")
    parser.add_argument("--bridges", help='with a name: Hidden State Bridges, such as "1.2>3.3", or the word paper')
    parser.add_argument("--classes", type=int, default=1000, help="with a name: outputs of the head")
    parser.add_argument("--check", nargs="+", metavar="HxW", help="image sizes to compare at (default: three)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 3], help="batch sizes to compare at")
    parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    options = parser.parse_args(list(arguments))
    check_minimum(options, batch=1, classes=1)
    return options


def _network(options: Namespace) -> tuple[Exportable, int, dict[str, str]]:
    """Return the network, the side of its images in pixels, and the metadata of the file."""
    changes = {name: getattr(options, name) for name in ("schedule", "bridges") if getattr(options, name) is not None}
    if timm.is_model(options.source) and not Path(options.source).exists():
        torch.manual_seed(0)
        cfg: Any = timm.get_pretrained_cfg(options.source)
        size = cfg.input_size[-1] if cfg else 224
        model = build_model(ModelConfig(name=options.source, **changes), options.classes, size)
        values = {
            "task": "classification",
            "model": {"name": options.source, **changes},
            "classes": [str(label) for label in range(options.classes)],
            "preprocess": _preprocess(ImageConfig(size=size)),
        }
        return _classifier(model, options.source, size, options), size, _strings(values)
    if not Path(options.source).exists():
        raise FileNotFoundError(
            f"{options.source}: neither a checkpoint nor the name of a network (sola_nano, sola_tiny, "
            "sola_small, sola_base)"
        )
    if changes:
        raise ValueError(f"--{next(iter(changes))} needs the name of a network: a checkpoint defines its own")
    _, description = read_description(options.source)
    metadata = _strings(description)
    task = description["task"]
    if task == "classification":
        checkpoint = load_checkpoint(options.source)
        size = checkpoint.image.size
        metadata |= _strings({"preprocess": _preprocess(checkpoint.image)})
        return _classifier(checkpoint.model, checkpoint.name, size, options), size, metadata
    if options.features:
        raise ValueError(f"--features needs a classifier, but {options.source} is a checkpoint for {task}")
    if task == "segmentation":
        from sola_vision.tasks.segmenter import load_segmenter

        return segmenter(load_segmenter(options.source).model), 224, metadata
    if task == "detection":
        from sola_vision.tasks.detector import load_detector

        return detector_pyramid(load_detector(options.source).model.backbone), 224, metadata
    raise ValueError(f"{options.source}: task {task!r} is not supported by this version")


def _classifier(model: torch.nn.Module, name: str, size: int, options: Namespace) -> Exportable:
    fixed = (size, size) if takes_one_size(name) else None
    return feature_maps(model, fixed) if options.features else classifier(model, fixed)


def _preprocess(image: ImageConfig) -> dict[str, Any]:
    """Return EvalTransform as values: `resize` of the shorter side, central `crop`, interpolation, mean and std."""
    whole, *_ = EvalTransform(image).pipeline.transforms
    return {
        "resize": whole.size,
        "crop": image.size,
        "interpolation": whole.interpolation.value,
        "mean": image.mean,
        "std": image.std,
    }


def _strings(values: dict[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in values.items()}


def _sizes(network: Exportable, size: int) -> list[tuple[int, int]]:
    """Return the network's own size, a wider one that the strides divide, and one that they do not divide."""
    if network.fixed_size is not None:
        return [network.fixed_size]
    return [(size, size), (size + 32, size + 96), (97, 131)]


def _print(report: Report) -> None:
    table = new_table(f"{report.path}: compared with PyTorch", "images", "worst output", "relative error")
    for c in report.comparisons:
        table.add_row(f"{c.batch} x {c.height}x{c.width}", c.output, f"{c.error:.1e}")
    show_table(table)
    print(f"{report.format}, {report.precision}, {report.bytes / 2**20:.1f} MiB; tolerance {report.tolerance:g}")
    print("images [batch, 3, height, width], normalised -> " + ", ".join(f"{n} {s}" for n, s in report.outputs.items()))
    if report.operators:
        kinds = amount(len(report.operators), "standard operator")
        print(f"{amount(sum(report.operators.values()), 'node')} of {kinds}, none of another domain")
    print(f"needs {report.needs}")
