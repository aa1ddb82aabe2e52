# SPDX-License-Identifier: Apache-2.0
"""Score a detector on annotated images, or any file of results in COCO's format.

Writes eval.json, classes.csv, precision_recall.png and, for a checkpoint, its results as COCO's server accepts them
(results.bbox.json, results.segm.json) and worst.png.
"""

import json
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from sola_vision.commands.arguments import (
    Arguments,
    check_minimum,
    evaluation_folder,
    out_folder,
    plain,
    print_skipped_count,
    refuse_unused,
)
from sola_vision.commands.results import agree_on_skipped, finite, prepare_folder, shard, watched, write_results
from sola_vision.commands.tables import new_table, show_table
from sola_vision.data import (
    CocoFolder,
    DetectionConfig,
    DetectionEvalTransform,
    MissingMaskError,
    collate_lists,
    mask_library,
    read_truth,
)
from sola_vision.engine import EvaluationBatches, distributed
from sola_vision.engine.log import json_text
from sola_vision.tasks.box_pictures import Shape, counted, draw_curves, draw_worst, shape_of
from sola_vision.tasks.coco_eval import KINDS, MAX_DETS, Kind, Score, check_results, score
from sola_vision.tasks.detection import NAMES, Detection, Findings
from sola_vision.tasks.detector import DetectorCheckpoint, load_detector
from sola_vision.wording import amount

_WORST = 6
_ROWS = 100  # longer tables are not printed, only written to classes.csv
_CONFIDENT = 0.5  # detections below this score are not counted as mistakes of an image


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = _parse(arguments)
    if options.results:
        _score_file(options)
    else:
        _score_checkpoint(options)


def make_parser() -> Arguments:
    """Return the parser of the command."""
    parser = Arguments("sola eval", __doc__)
    parser.add_argument("--checkpoint", help="best.safetensors, or a run's folder")
    parser.add_argument("--data", help="folder with annotations/instances_SPLIT.json and images in SPLIT/")
    parser.add_argument("--split", default="val", help="train or val (default)")
    parser.add_argument("--size", type=int, help="pixels of an image's shorter side (default: as in training)")
    parser.add_argument("--results", help="JSON of results to score instead of a checkpoint")
    parser.add_argument("--annotations", help="JSON of the ground truth for --results")
    parser.add_argument(
        "--type", choices=KINDS, help="score boxes or masks of --results (default: all that the file contains)"
    )
    parser.add_argument(
        "--max-dets",
        type=int,
        help=f"detections per image that count (default: {MAX_DETS} as in COCO, or as many as the checkpoint reports)",
    )
    parser.add_argument("--workers", type=int, default=2, help="number of processes that read images")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", help="folder for tables and pictures (default: eval/, next to the checkpoint)")
    parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    return parser


def _parse(arguments: Sequence[str]) -> Namespace:
    options = make_parser().parse_args(list(arguments))
    needed = ("annotations",) if options.results else ("checkpoint", "data")
    if missing := [f"--{name}" for name in needed if getattr(options, name) is None]:
        given = "--results RESULTS.json" if options.results else "a detector"
        raise ValueError(f"{' and '.join(missing)} missing: sola eval of {given} needs --{' and --'.join(needed)}")
    if options.results:
        refuse_unused(options, "results", ("checkpoint", "data", "size"))
    if options.type and not options.results:
        raise ValueError("--type needs --results: a checkpoint is scored on everything it predicts; leave it out")
    check_minimum(options, max_dets=1, workers=0)
    return options


def _score_file(options: Namespace) -> None:
    out = out_folder(options.out or "eval")
    mask_library()
    truth = read_truth(Path(options.annotations))
    path = Path(options.results)
    try:
        results = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"--results {path}: no such file") from None
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"--results {path} is not JSON: {error}") from None
    _check_images(path, truth, options.annotations)
    kinds = [options.type] if options.type else _kinds_of(results)
    if "segm" in kinds and (
        bare := [a for a in truth["annotations"] if not (a.get("segmentation") or "unmasked" in a)]
    ):
        if options.type:
            raise ValueError(
                f"{options.annotations}: {amount(len(bare), 'annotation')} without a mask: use --type bbox"
            )
        kinds.remove("segm")
    for kind in kinds:
        check_results(results, truth, kind, str(path))
    max_dets = options.max_dets or MAX_DETS
    scores = [score(truth, results, kind, max_dets=max_dets) for kind in kinds]
    prepare_folder(out, options)
    result = {
        "results": options.results,
        "annotations": options.annotations,
        "images": len(truth["images"]),
        **_numbers(scores, truth),
    }
    write_results(result, out)
    _report(result, scores, out, options.json, "")


def _check_images(results: Path, truth: dict[str, Any], annotations: str) -> None:
    """Raise ValueError if the images.json that `sola predict` wrote next to its results has other image ids."""
    listed = results.with_name("images.json")
    try:
        predicted = {image["id"]: image["file_name"] for image in json.loads(listed.read_bytes())["images"]}
    except (OSError, ValueError, LookupError, TypeError):
        return  # results of another program
    names = {image["id"]: str(image.get("file_name", "")) for image in truth["images"]}
    for number, name in predicted.items():
        true = names.get(number, "")
        # either may contain a folder
        if not (f"/{true}".endswith(f"/{name}") or f"/{name}".endswith(f"/{true}")):
            raise ValueError(
                f"--results {results}: image_id {number} is {name} there, but {true or 'no image'} in {annotations}: "
                "`sola predict` counts its own images; use `sola eval --checkpoint`, which writes results with the "
                "ids of the annotations"
            )


def _kinds_of(results: Any) -> list[Kind]:
    """Return the kinds that all results have; boxes if there are none, so that the check reports the problem."""
    entries = [result for result in results if isinstance(result, dict)] if isinstance(results, list) else []
    fields: dict[Kind, str] = {"bbox": "bbox", "segm": "segmentation"}
    return [kind for kind in KINDS if entries and all(fields[kind] in entry for entry in entries)] or ["bbox"]


def image_at(image: DetectionConfig, size: int | None) -> DetectionConfig:
    """Return the settings of a checkpoint with a shorter side of `size` pixels; None: as in training."""
    if size is None:
        return image
    # an unchanged limit of the longer side would silently undo the size
    longest = max(size, image.longest if image.size is None else round(image.longest * size / image.size))
    return replace(image, size=size, longest=longest, zoom=1.0)


def _score_checkpoint(options: Namespace) -> None:
    out = out_folder(options.out or evaluation_folder(options.checkpoint))
    checkpoint = load_detector(options.checkpoint)
    model = checkpoint.model
    model.transform.config = image = image_at(checkpoint.image, options.size)
    if options.max_dets:
        model.roi_heads.detections_per_img = options.max_dets
    max_dets = int(model.roi_heads.detections_per_img)
    masks = model.has_masks
    folder = partial(CocoFolder, options.data, options.split, DetectionEvalTransform(), checkpoint.classes)
    try:
        dataset = folder(masks=None if masks else False)
    except MissingMaskError as error:
        print(f"sola: {error.found}: only boxes are scored", file=sys.stderr)
        dataset = folder(masks=False)
    # a detector with masks can be evaluated on data with boxes only
    task = Detection(dataset, max_dets, masks=masks and dataset.masks)
    with distributed(options.device) as world:
        model.to(world.device)
        if world.is_main:
            prepare_folder(out, options)
        batches = EvaluationBatches(dataset, world, batch_size=1, workers=options.workers, collate=collate_lists)
        start = time.perf_counter()
        total = len(shard(len(dataset), world))
        findings = task.find(model, watched(batches, total, "evaluating", world.is_main))
        agree_on_skipped(batches)
        seconds = time.perf_counter() - start
        scores = task.scores(findings)
        if not world.is_main:
            return
    result = {
        "checkpoint": str(options.checkpoint),
        "data": options.data,
        "split": options.split,
        "model": checkpoint.name,
        "size": image.size,
        "longest": image.longest,
        "images": len(findings.image_ids),
        "images_skipped": len(batches.skipped.known),
        "seconds": round(seconds, 2),
        **_numbers(scores, task.truth),
    }
    write_results(result, out)
    for kind in KINDS:
        file = out / f"results.{kind}.json"
        file.unlink(missing_ok=True)  # of an earlier evaluation, perhaps of data with masks
        if kind in task.kinds:
            file.write_text(json.dumps(task.known(findings).of(kind)) + "\n")
    _draw_worst(checkpoint, dataset, findings, _crowds(task.truth, dataset), out / "worst.png")
    _report(result, scores, out, options.json, "results.*.json, worst.png, ")


def _numbers(scores: Sequence[Score], truth: dict[str, Any]) -> dict[str, Any]:
    counts: dict[int, int] = {}
    for annotation in truth["annotations"]:
        if not annotation["iscrowd"]:
            counts[annotation["category_id"]] = counts.get(annotation["category_id"], 0) + 1
    classes = []
    for label, category in enumerate(sorted(truth["categories"], key=lambda category: category["id"])):
        row = {"class": str(category["name"]), "category_id": category["id"], "objects": counts.get(category["id"], 0)}
        for one in scores:
            row[f"{NAMES[one.kind]}_ap"] = finite(100 * one.average(label=label))
            row[f"{NAMES[one.kind]}_ap50"] = finite(100 * one.average(label=label, threshold=0.5))
        classes.append(row)
    return {
        "max_dets": scores[0].max_dets[2],
        **{one.kind: {name: finite(100 * value) for name, value in one.numbers.items()} for one in scores},
        "classes": classes,
    }


def _crowds(truth: dict[str, Any], dataset: CocoFolder) -> dict[int, list[Shape]]:
    """Return the crowd regions of each image, in which no detection counts as wrong."""
    crowds: dict[int, list[Shape]] = {}
    labels = {number: label for label, number in enumerate(dataset.category_ids)}
    for annotation in truth["annotations"]:
        if annotation["iscrowd"]:
            crowds.setdefault(int(annotation["image_id"]), []).append(shape_of(annotation, labels))
    return crowds


def _draw_worst(
    checkpoint: DetectorCheckpoint,
    dataset: CocoFolder,
    findings: Findings,
    crowds: dict[int, list[Shape]],
    out: Path,
) -> None:
    """Draw the images with the lowest share of correct boxes in true objects and confident detections, at IoU 0.5."""
    by_image: dict[int, list[Shape]] = {number: [] for number in findings.image_ids}
    labels = {number: label for label, number in enumerate(dataset.category_ids)}
    for result in findings.results:
        if result["score"] >= _CONFIDENT:
            # the mask in run lengths, of which only those of the worst images are decoded
            by_image[result["image_id"]].append(shape_of(result, labels, result.get("segmentation")))
    judged = []
    for index, number in enumerate(dataset.image_ids):
        if number in by_image:
            truth = _true_shapes(dataset, index)
            found, right = counted(truth, by_image[number], crowds.get(number, []))
            by_image[number] = found
            if truth or found:
                judged.append((2 * right / (len(truth) + len(found)), index, right))
    examples = []
    for _, index, right in sorted(judged)[:_WORST]:
        truth, found = _true_shapes(dataset, index, masks=True), by_image[dataset.image_ids[index]]
        drawn = [s if s.mask is None else replace(s, mask=mask_library().decode(s.mask)) for s in found]
        caption = f"{right} correct, {len(found) - right} wrong, {len(truth) - right} missed"
        name = Path(dataset.location(index)).name
        examples.append((name, dataset.image(index), truth, drawn, caption))
    draw_worst(examples, checkpoint.classes, out)


def _true_shapes(dataset: CocoFolder, index: int, masks: bool = False) -> list[Shape]:
    objects = dataset.objects(index)
    with_masks = masks and objects.segmentations is not None
    return [
        Shape((x0, y0, x1, y1), int(label) - 1, None, objects.mask(number) if with_masks else None)
        for number, ((x0, y0, x1, y1), label) in enumerate(zip(objects.boxes.tolist(), objects.labels, strict=True))
    ]


def _report(result: dict[str, Any], scores: Sequence[Score], out: Path, as_json: bool, more: str) -> None:
    draw_curves(scores, out / "precision_recall.png")
    if as_json:
        print(json_text(result))
        return
    _print(result, scores)
    split = f" of {result['split']}" if "split" in result else ""
    print(f"eval.json, classes.csv, {more}precision_recall.png{split} are in {out}")


def _print(result: dict[str, Any], scores: Sequence[Score]) -> None:
    what = result.get("model", result.get("results"))
    where = f"{result['data']}, {result['split']}" if "data" in result else result["annotations"]
    classes = [row for row in result["classes"] if row["objects"]]
    if len(classes) <= _ROWS:
        names = [name for name in result["classes"][0] if name not in ("class", "category_id", "objects")]
        columns = (f"{name.replace('_', ' ').replace('ap', 'AP')} %" for name in names)
        title = plain(f"{what} on {where}: {amount(result['images'], 'image')}")
        table = new_table(title, "class", "objects", *columns)
        for row in classes:
            table.add_row(plain(row["class"]), str(row["objects"]), *(_cell(row[name]) for name in names))
        show_table(table, 0)
    kinds = ("boxes %" if one.kind == "bbox" else "masks %" for one in scores)
    totals = new_table(f"at maxDets {result['max_dets']}", "", *kinds)
    for name in scores[0].numbers:
        totals.add_row(name, *(_cell(result[one.kind][name]) for one in scores))
    show_table(totals, 0)
    print_skipped_count(result.get("images_skipped", 0))


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
