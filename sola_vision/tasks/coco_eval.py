# SPDX-License-Identifier: Apache-2.0
"""COCO's average precision of boxes or masks, by faster-coco-eval, which gives the numbers of pycocotools.

`score(truth, results, "bbox" or "segm")` takes any documents in COCO's formats. maxDets, the number of detections per
image that count, is the largest of three; COCO's default is 100.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from sola_vision.data import is_finite, mask_library, unusable_mask

Kind = Literal["bbox", "segm"]
KINDS: tuple[Kind, ...] = ("bbox", "segm")
MAX_DETS = 100
THRESHOLDS = np.linspace(0.5, 0.95, 10)  # minimum IoU of a correct detection
RECALLS = np.linspace(0, 1, 101)
_AREAS = {"all": (0, 1e5**2), "small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e5**2)}


@dataclass(frozen=True)
class Score:
    """precision [thresholds, recalls, classes, areas, 3] and recall [thresholds, classes, areas, 3], as in COCO's API
    (-1 without ground truth); the last axis is `max_dets`.
    """

    kind: Kind
    max_dets: tuple[int, int, int]
    classes: list[str]
    precision: np.ndarray
    recall: np.ndarray

    @property
    def numbers(self) -> dict[str, float]:
        """COCO's twelve metrics from 0 to 1 in its order; nan without ground truth, where COCO has -1."""
        few, some, most = self.max_dets
        return {
            "AP": self.average(),
            "AP50": self.average(threshold=0.5),
            "AP75": self.average(threshold=0.75),
            "APs": self.average(area="small"),
            "APm": self.average(area="medium"),
            "APl": self.average(area="large"),
            f"AR{few}": _mean(self.recall[:, :, 0, 0]),
            f"AR{some}": _mean(self.recall[:, :, 0, 1]),
            f"AR{most}": _mean(self.recall[:, :, 0, 2]),
            **{f"AR{a[0]}": _mean(self.recall[:, :, i, 2]) for i, a in enumerate(_AREAS) if i},
        }

    def average(self, *, threshold: float | None = None, area: str = "all", label: int | None = None) -> float:
        """Return the AP over all thresholds or at one, over all classes or of one (`label`, from 0)."""
        values = self.precision[:, :, :, list(_AREAS).index(area), 2]
        if threshold is not None:
            values = values[np.isclose(THRESHOLDS, threshold)]
        return _mean(values if label is None else values[:, :, label])

    def curve(self, label: int, threshold: float = 0.5) -> np.ndarray:
        """Return the precision of class `label` (from 0) at the recalls 0, 0.01, ..., 1; -1 without ground truth."""
        return self.precision[int(np.flatnonzero(np.isclose(THRESHOLDS, threshold))[0]), :, label, 0, 2]


def _mean(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan


def score(
    truth: dict[str, Any],
    results: Sequence[dict[str, Any]],
    kind: Kind,
    *,
    max_dets: int = MAX_DETS,
    image_ids: Sequence[int] | None = None,
) -> Score:
    """Score `results` on all images of the truth, or on `image_ids`; results must have passed `check_results`."""
    mask_library()  # raises an ImportError with a hint if the package is missing
    from faster_coco_eval import COCO
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster

    wanted = set(truth_ids(truth) if image_ids is None else image_ids)
    # with a box next to a mask, the library would take the result's area from the box
    fields = {"image_id", "category_id", "score", "bbox" if kind == "bbox" else "segmentation"}
    own = [
        {name: value for name, value in result.items() if name in fields}
        for result in results
        if result["image_id"] in wanted
    ]
    # copies, because the library modifies its input; it also cannot score objects without masks
    reference = COCO(
        {
            "images": [dict(image) for image in truth["images"]],
            "annotations": [dict(a) for a in truth["annotations"] if kind == "bbox" or a.get("segmentation")],
            "categories": [dict(category) for category in truth["categories"]],
        }
    )
    evaluation = COCOeval_faster(reference, reference.loadRes(own), kind, print_function=_silent)
    limits = (min(1, max_dets), min(10, max_dets), max_dets)
    evaluation.params.maxDets = list(limits)
    evaluation.params.imgIds = sorted(wanted)
    evaluation.evaluate()
    evaluation.accumulate()
    names = {int(category["id"]): str(category["name"]) for category in truth["categories"]}
    classes = [names[int(number)] for number in evaluation.params.catIds]
    precision, recall = (np.asarray(evaluation.eval[name]) for name in ("precision", "recall"))
    return Score(kind, limits, classes, precision, recall)


def truth_ids(truth: dict[str, Any]) -> list[int]:
    """Return the ids of the images in a truth document."""
    return [int(image["id"]) for image in truth["images"]]


def check_results(results: Any, truth: dict[str, Any], kind: Kind, name: str) -> list[dict[str, Any]]:
    """Return the results if they can be scored, else raise a ValueError with the entry of `name` and the reason."""
    if not isinstance(results, list):
        raise ValueError(f"{name} must hold a list of results in COCO's format")
    sizes = {image["id"]: (image["height"], image["width"]) for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    field = "bbox" if kind == "bbox" else "segmentation"
    for index, result in enumerate(results):
        where = f"{name}: result {index}"
        if not isinstance(result, dict) or any(key not in result for key in ("image_id", "category_id", "score")):
            raise ValueError(f"{where} must have image_id, category_id and score (got {result!r:.80})")
        for key, known in (("image", sizes), ("category", categories)):
            number = result[f"{key}_id"]
            if not isinstance(number, int | float) or number not in known:
                raise ValueError(f"{where} has {key}_id {number!r:.80}, which is not in the annotations")
        if field not in result:
            raise ValueError(f"{where} has no {field}: choose another --type, or pass results of that type")
        if not is_finite(result["score"]):
            raise ValueError(f"{where}: score must be a finite number (got {result['score']!r:.80})")
        if kind == "bbox":
            box = result["bbox"]
            if not isinstance(box, list) or len(box) != 4 or not all(map(is_finite, box)):
                raise ValueError(f"{where}: bbox must be four finite numbers x, y, width, height (got {box!r:.80})")
        else:
            _check_mask(result["segmentation"], sizes[result["image_id"]], where)
    return results


def _check_mask(mask: Any, size: tuple[int, int], where: str) -> None:
    if not isinstance(mask, dict) or not isinstance(mask.get("counts"), str):
        raise ValueError(f"{where}: segmentation must be compressed run lengths (got {mask!r:.80})")
    if reason := unusable_mask(mask, size):
        raise ValueError(f"{where} comes {reason} (image size {size[0]}x{size[1]})")


def _silent(*_: object) -> None:
    pass
