# SPDX-License-Identifier: Apache-2.0
"""Detection: the losses of Mask R-CNN, COCO's average precision of boxes and masks, results in COCO's format.

Batches are (images, targets), lists of one entry an image (`data.detection_presets`).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sola_vision.data import CocoFolder, encode_mask, mask_library
from sola_vision.engine import gather_objects, on_main
from sola_vision.tasks.coco_eval import KINDS, Kind, Score, score
from sola_vision.tasks.detector import Detector, detect

Result = dict[str, Any]

NAMES = {"bbox": "box", "segm": "mask"}
_LOGGED = ("AP", "AP50", "AP75", "APs", "APm", "APl")


@dataclass(frozen=True)
class Findings:
    """The results of a detector on a dataset, over all processes, in COCO's format, and the ids of the images seen."""

    results: list[Result]
    image_ids: list[int]

    def of(self, kind: Kind) -> list[Result]:
        """Return the results in the format of COCO's server, boxes or masks."""
        fields = ("image_id", "category_id", "score", "bbox" if kind == "bbox" else "segmentation")
        return [{name: result[name] for name in fields} for result in self.results]


class Detection:
    """The task of `engine.fit`; metrics in percent against the truth of `held_out`."""

    def __init__(self, held_out: CocoFolder, max_dets: int, *, masks: bool) -> None:
        mask_library()  # fail now, not after hours of training, if the package is missing
        self.truth = held_out.truth()
        self.category_ids = held_out.category_ids
        self.max_dets = max_dets
        self.kinds: tuple[Kind, ...] = KINDS if masks else KINDS[:1]
        self.metric = "mask_ap" if masks else "box_ap"
        self.printed = {f"{NAMES[kind]}_{name.lower()}": "%" for kind in self.kinds for name in _LOGGED}

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets = batch
        with_tensors = [{name: value for name, value in t.items() if isinstance(value, Tensor)} for t in targets]
        losses = model(images, with_tensors)
        return torch.stack(list(losses.values())).sum(), losses

    def evaluate(self, model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
        scores = self.scores(self.find(model, batches))
        # the metric that selects the best weights is present even if no readable image has an object
        return {self.metric: math.nan} | {name: value for one in scores for name, value in metrics(one).items()}

    def find(self, model: nn.Module, batches: Iterable[Any]) -> Findings:
        """Return the results on the batches of all processes, in the order of the image ids."""
        assert isinstance(model, Detector)
        results: list[Result] = []
        seen: list[int] = []
        for images, targets in batches:
            for image, target, found in zip(images, targets, detect(model, images), strict=True):
                seen.append(int(target["image_id"]))
                results += to_results(found, seen[-1], (image.shape[-2], image.shape[-1]), self.category_ids)
        results, seen = gather_objects(results), gather_objects(seen)
        return Findings(sorted(results, key=lambda result: result["image_id"]), sorted(seen))

    def known(self, findings: Findings) -> Findings:
        """Drop results of classes that the held-out set lacks: they are not errors, and their ids are made up."""
        ids = {category["id"] for category in self.truth["categories"]}
        return replace(findings, results=[result for result in findings.results if result["category_id"] in ids])

    def scores(self, findings: Findings) -> list[Score]:
        """Return COCO's scores of boxes and, if learned, of masks; the first process computes them for all."""
        own = self.known(findings).results
        return on_main(
            lambda: [
                score(self.truth, own, kind, max_dets=self.max_dets, image_ids=findings.image_ids)
                for kind in self.kinds
            ]
        )


def metrics(one: Score) -> dict[str, float]:
    """Return the six average precisions in percent, box_ap ... mask_apl, without those that have no ground truth."""
    numbers = {name: one.numbers[name] for name in _LOGGED}
    return {f"{NAMES[one.kind]}_{name.lower()}": 100 * v for name, v in numbers.items() if v == v}


def to_results(
    found: dict[str, Tensor], image_id: int, size: tuple[int, int], category_ids: Sequence[int]
) -> list[Result]:
    """Return a detector's output for an image of `size` (H, W) in COCO's format."""
    boxes = found["boxes"].double().cpu().numpy()
    scores, labels = found["scores"].double().tolist(), found["labels"].tolist()
    masks = found["masks"].float().cpu().numpy() if "masks" in found else None
    results = []
    for index, (box, value, label) in enumerate(zip(boxes, scores, labels, strict=True)):
        x0, y0, x1, y1 = box.tolist()
        result: Result = {
            "image_id": image_id,
            "category_id": category_ids[label - 1],
            "bbox": [x0, y0, x1 - x0, y1 - y0],
            "score": value,
        }
        if masks is not None:
            result["segmentation"] = encode_mask(paste_mask(masks[index], box, size))
        results.append(result)
    return results


def paste_mask(mask: np.ndarray, box: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return probabilities [m, m] over a box x0 y0 x1 y1 as a mask uint8 [H, W] of the pixels with at least 0.5."""
    # not in the paper: bilinear at pixel centres, as in MMDetection; torchvision first rounds the box to whole pixels,
    # which costs small objects much of their overlap
    pasted = np.zeros(size, np.uint8)
    spans = []
    for low, high, side in ((box[1], box[3], size[0]), (box[0], box[2], size[1])):
        first, last = max(0, int(np.floor(low)) - 1), min(side, int(np.ceil(high)) + 1)
        centres = np.arange(first, last) + 0.5
        places = (centres - low) / max(high - low, 1e-6) * len(mask) - 0.5
        weights = 1 - np.abs(places[:, None] - np.arange(len(mask)))
        spans.append((slice(first, last), weights.clip(0)))
    (rows, down), (columns, across) = spans
    pasted[rows, columns] = down @ mask @ across.T >= 0.5
    return pasted
