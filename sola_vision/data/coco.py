# SPDX-License-Identifier: Apache-2.0
"""Detection and instance segmentation data: a folder of images with annotations in COCO's format.

Supported layouts, for the splits train and val:
    ROOT/annotations/instances_val.json      images in ROOT/val/ (in COCO: instances_val2017.json and val2017/)
    ROOT/val/_annotations.coco.json          images in the same folder (val/ may be called valid/)

Labels are 1..K in the order of the category ids, which need not be contiguous; 0 is the background. Crowds are not used
in training, and the evaluation ignores detections on them. Unusable annotations are skipped and logged by reason.
"""

import json
import logging
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..wording import amount
from .images import read_image
from .run_lengths import mask_library, run_lengths, unusable_mask

logger = logging.getLogger(__name__)

SPLITS = {
    "train": ("train", "train2017", "train2014"),
    "val": ("val", "val2017", "val2014", "valid", "validation", "test"),
}
_LAYOUT = (
    "expected ROOT/annotations/instances_SPLIT.json with images in ROOT/SPLIT/, or ROOT/SPLIT/_annotations.coco.json"
)


@dataclass(frozen=True)
class Objects:
    """The objects of one image of `size` (H, W), without crowds. boxes [n, 4] x0 y0 x1 y1 inside it, labels [n]."""

    image_id: int
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    segmentations: Sequence[Any] | None  # in COCO's format; None if masks are not used
    names: Sequence[str]  # of the annotations, for errors

    def mask(self, index: int) -> np.ndarray:
        """Return the mask of object `index` as [H, W] uint8 of 0 and 1."""
        assert self.segmentations is not None
        try:
            return mask_library().decode(run_lengths(self.segmentations[index], self.size))
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.names[index]}: the mask cannot be read: {error}") from None


class MissingMaskError(ValueError):
    """Raised if some objects have a mask and others do not."""

    def __init__(self, found: str) -> None:
        super().__init__(f"{found}: add them, or train on boxes alone (--image.masks false)")
        self.found = found


class CocoFolder(Dataset[Any]):
    """One split; samples are transform(image, objects) of a PIL image and its Objects.

    `classes` are the category names in the order of their ids, or the given ones (of a checkpoint): the split may lack
    some of them but must not have others. `category_ids` are the ids of the classes in this split. `masks`: None = use
    masks if the data has them.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        transform: Callable[[Image.Image, Objects], Any] | None = None,
        classes: Sequence[str] | None = None,
        *,
        masks: bool | None = None,
        keep_empty: bool = True,
    ) -> None:
        self.file, self.folder = _find(Path(root).expanduser(), split)
        document = read_document(self.file)
        self.transform = transform
        images = _images(document, self.file)
        self.categories = _categories(document, self.file)
        names = [name for _, name in self.categories]
        self.classes = names if classes is None else list(classes)
        if unknown := [name for name in names if name not in self.classes]:
            raise ValueError(
                f"{self.file}: category {unknown[0]!r} is not among the "
                f"{amount(len(self.classes), 'known class', 'known classes')} "
                f"({', '.join(self.classes[:5])}{', ...' if len(self.classes) > 5 else ''}): "
                "rename or remove it, or train with it"
            )
        ids = {name: number for number, name in self.categories}
        # a class that this split lacks needs an unused id while results are gathered
        spare = max(ids.values(), default=0) + 1
        self.category_ids = [ids.get(name, spare + label) for label, name in enumerate(self.classes)]
        labels = {ids[name]: label for label, name in enumerate(self.classes, start=1) if name in ids}
        by_image, dropped = _sort(document["annotations"], images, labels, self.file)
        dropped.log(self.file, len(document["annotations"]))
        self.masks = self._decide_masks(by_image, masks)
        kept = [image for image in images.values() if keep_empty or any(a["object"] for a in by_image[image["id"]])]
        if not any(annotation["object"] for image in kept for annotation in by_image[image["id"]]):
            raise ValueError(f"{self.file} has no objects in its {amount(len(images), 'image')}")
        self.image_ids = [int(image["id"]) for image in kept]
        # one array of bytes instead of a million dictionaries: forked workers share it without copying
        records = [json.dumps(self._record(image, by_image[image["id"]], labels)).encode() for image in kept]
        self._bytes = np.frombuffer(b"".join(records), dtype=np.uint8)
        self._ends = np.cumsum([len(record) for record in records])
        self._check_files(kept)

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> Any:
        image, objects = self.image(index), self.objects(index)
        return (image, objects) if self.transform is None else self.transform(image, objects)

    def image(self, index: int) -> Image.Image:
        """Return image `index` upright, in RGB; OSError or ValueError if missing, corrupt or of another size."""
        image = read_image(self._path(self._load(index)["file_name"]), name=self.location(index))
        height, width = self._load(index)["size"]
        if image.size != (width, height):
            raise ValueError(
                f"{self.location(index)} is {image.height}x{image.width}, but {height}x{width} in {self.file.name}: "
                "its boxes would be misplaced; write the annotations for this image again"
            )
        return image

    def objects(self, index: int) -> Objects:
        """Return the objects of image `index`."""
        record = self._load(index)
        return Objects(
            image_id=self.image_ids[index],
            size=(record["size"][0], record["size"][1]),
            boxes=np.array(record["boxes"], dtype=np.float64).reshape(-1, 4),
            labels=np.array(record["labels"], dtype=np.int64),
            segmentations=record["segmentations"],
            names=[f"{self.location(index)}: annotation {number}" for number in record["annotations"]],
        )

    def location(self, index: int) -> str:
        """Return the path of image `index`, for messages."""
        return str(self.folder / self._load(index)["file_name"])

    def truth(self) -> dict[str, Any]:
        """Return the document to score results against."""
        return read_truth(self.file)

    def _path(self, name: str) -> Path:
        """Return the path of a file, whose name on disk may be in another Unicode normalisation form."""
        forms = (name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))
        return next((path for form in forms if (path := self.folder / form).is_file()), self.folder / name)

    def _load(self, index: int) -> dict[str, Any]:
        first = self._ends[index - 1] if index else 0
        return json.loads(self._bytes[first : self._ends[index]].tobytes())

    def _record(self, image: dict[str, Any], annotations: list[dict[str, Any]], labels: dict[int, int]) -> Any:
        height, width = image["height"], image["width"]
        objects = [annotation for annotation in annotations if annotation["object"]]
        boxes = np.array([annotation["bbox"] for annotation in objects], dtype=np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return {
            "file_name": image["file_name"],
            "size": (height, width),
            "boxes": boxes.clip(0, [width, height, width, height]).tolist(),
            "labels": [labels[annotation["category_id"]] for annotation in objects],
            "segmentations": [annotation["segmentation"] for annotation in objects] if self.masks else None,
            "annotations": [annotation["id"] for annotation in objects],
        }

    def _decide_masks(self, by_image: dict[int, list[dict[str, Any]]], wanted: bool | None) -> bool:
        objects = [annotation for some in by_image.values() for annotation in some if annotation["object"]]
        without = [annotation["id"] for annotation in objects if not annotation.get("segmentation")]
        if wanted is False or (wanted is None and len(without) == len(objects)):
            return False
        if without:
            first = f"the first: annotation {without[0]}"
            raise MissingMaskError(
                f"{self.file}: no mask for {len(without)} of {amount(len(objects), 'object')} ({first})"
            )
        return True

    def _check_files(self, images: list[dict[str, Any]]) -> None:
        """Raise FileNotFoundError if all files are missing; a few count as unreadable images when they are loaded."""
        missing = [image["file_name"] for image in images if not self._path(image["file_name"]).is_file()]
        if missing and len(missing) == len(images):
            listed = f"like all {len(images)} images" if len(images) > 1 else "the only image"
            raise FileNotFoundError(
                f"{self.folder / missing[0]}: not found, {listed} listed in {self.file}; put them into {self.folder}"
            )
        if missing:
            logger.warning(
                "%s: %d of %d image files not found (the first: %s)", self.file, len(missing), len(images), missing[0]
            )


class _Dropped:
    """Unusable annotations, by reason."""

    def __init__(self) -> None:
        self.reasons: dict[str, list[Any]] = {}

    def add(self, reason: str, annotation: Any) -> None:
        """Record an unusable annotation."""
        self.reasons.setdefault(reason, []).append(annotation.get("id") if isinstance(annotation, dict) else None)

    def log(self, file: Path, total: int, what: str = "skipped") -> None:
        """Log the number of annotations and the first one for each reason."""
        if self.reasons:
            count = sum(map(len, self.reasons.values()))
            why = "; ".join(f"{len(ids)} {why} (annotation {ids[0]})" for why, ids in self.reasons.items())
            logger.warning("%s: %s %d of %s: %s", file, what, count, amount(total, "annotation"), why)


def read_document(file: Path) -> dict[str, Any]:
    """Return the content of a COCO JSON file; ValueError if one of its three lists is missing."""
    try:
        document = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file") from None
    except (UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    for name in ("images", "annotations", "categories"):
        if not isinstance(document, dict) or not isinstance(document.get(name), list):
            raise ValueError(f"{file} has no list {name!r}: COCO's format has images, annotations and categories")
    return document


def read_truth(file: Path) -> dict[str, Any]:
    """Read a COCO JSON file to score results against: boxes, areas and crowds as stored, without unusable annotations.

    An object with an unusable mask keeps its box and gets the key "unmasked" instead: it counts for boxes only.
    """
    document = read_document(file)
    images = _images(document, file)
    labels = dict.fromkeys((number for number, _ in _categories(document, file)), 0)
    by_image, dropped = _sort(document["annotations"], images, labels, file, scoring=True)
    dropped.log(file, len(document["annotations"]), "scoring skips")
    annotations = [annotation for some in by_image.values() for annotation in some]
    # the evaluator marks matches by annotation id, so ids must be present, unique and not 0
    complete = [
        _complete(annotation, images, file) | {"id": number} for number, annotation in enumerate(annotations, 1)
    ]
    return {"images": list(images.values()), "annotations": complete, "categories": document["categories"]}


def _find(root: Path, split: str) -> tuple[Path, Path]:
    """Return the annotation file of a split and the folder of its images."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; {_LAYOUT}")
    names = SPLITS.get(split, (split,))
    for name in names:
        if (file := root / "annotations" / f"instances_{name}.json").is_file():
            folder = next((f for f in (root / name, root / "images" / name) if f.is_dir()), None)
            if folder is None:
                raise FileNotFoundError(f"{root / name} with the images of {file} not found: add the folder")
            return file, folder
        if (file := root / name / "_annotations.coco.json").is_file():
            return file, root / name
    raise ValueError(f"{root} has no annotations of the split {split} (looked for {', '.join(names)}); {_LAYOUT}")


def _images(document: dict[str, Any], file: Path) -> dict[int, dict[str, Any]]:
    images: dict[int, dict[str, Any]] = {}
    for image in document["images"]:
        sizes = [image.get("height"), image.get("width")] if isinstance(image, dict) else []
        if not sizes or not isinstance(image.get("id"), int) or not isinstance(image.get("file_name"), str):
            got = {name: image.get(name) for name in ("id", "file_name")} if isinstance(image, dict) else image
            raise ValueError(f"{file}: an image must have an integer id and a file_name (got {got!r:.120})")
        # some programs write 640.0
        whole = [int(side) if isinstance(side, float) and side.is_integer() else side for side in sizes]
        if not all(isinstance(side, int) and side > 0 for side in whole):
            raise ValueError(f"{file}: height and width of image {image['id']} must be integers above 0 (got {sizes})")
        path = Path(image["file_name"])
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"{file}: file_name of image {image['id']} must lie below the image folder (got {path})")
        if image["id"] in images:
            raise ValueError(f"{file}: duplicate image id {image['id']}: use unique ids")
        images[image["id"]] = {**image, "height": whole[0], "width": whole[1]}
    if not images:
        raise ValueError(f"{file} lists no images")
    return images


def _categories(document: dict[str, Any], file: Path) -> list[tuple[int, str]]:
    """Return (id, name) sorted by id; an unused background category, as some programs write it, is kept as a class."""
    names: dict[int, str] = {}
    for category in document["categories"]:
        if not isinstance(category, dict) or not isinstance(category.get("id"), int) or "name" not in category:
            raise ValueError(f"{file}: a category must have an integer id and a name (got {category!r:.80})")
        if category["id"] in names or str(category["name"]) in names.values():
            raise ValueError(f"{file}: duplicate category {category['id']} {category['name']!r}: remove one")
        names[category["id"]] = str(category["name"])
    if not names:
        raise ValueError(f"{file} lists no categories")
    return sorted(names.items())


def _sort(
    annotations: list[Any],
    images: dict[int, dict[str, Any]],
    labels: dict[int, int],
    file: Path,
    *,
    scoring: bool = False,
) -> tuple[dict[int, list[dict[str, Any]]], _Dropped]:
    """Return the usable annotations by image; their key "object" is false for crowds.

    With `scoring`, a box without area or outside the image is kept as an object that cannot be matched, as in COCO's
    API, and an object with an unusable mask is kept for scoring boxes.
    """
    by_image: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
    dropped = _Dropped()
    for annotation in annotations:
        number: Any = annotation.get("image_id") if isinstance(annotation, dict) else None
        image = None if isinstance(number, list | dict) else images.get(number)
        if image is None:
            dropped.add("of an image not in the list", annotation)
            continue
        category = annotation.get("category_id")
        if not isinstance(category, int | float) or category not in labels:
            raise ValueError(
                f"{file}: annotation {annotation.get('id')} has category_id {category!r:.80}, which "
                f"is not among the {amount(len(labels), 'category', 'categories')}: add the category, or remove "
                "the annotation"
            )
        crowd = annotation.get("iscrowd") or 0
        if crowd not in (0, 1):
            raise ValueError(
                f"{file}: annotation {annotation.get('id')} has iscrowd {crowd!r:.80}: use the number 0 or 1"
            )
        usable = {"id": None, **annotation, "iscrowd": int(crowd), "object": not crowd}
        bad_box = _unusable_box(annotation.get("bbox"), image, scoring)
        bad_mask = unusable_mask(annotation.get("segmentation"), (image["height"], image["width"]))
        if bad_mask and scoring and not bad_box:
            dropped.add(f"{bad_mask}, for masks only", annotation)
            by_image[image["id"]].append({**usable, "segmentation": None, "unmasked": True})
        elif reason := bad_box or bad_mask:
            dropped.add(reason, annotation)
        else:
            by_image[image["id"]].append(usable)
    return by_image, dropped


def _unusable_box(box: Any, image: dict[str, Any], scoring: bool) -> str | None:
    if not isinstance(box, list) or len(box) != 4 or not all(type(v) in (int, float) for v in box):
        return "without a box of four numbers"
    if not all(map(is_finite, box)):
        return "with a box that is not finite"
    x, y, width, height = box
    if scoring:
        return None
    if width <= 0 or height <= 0:
        return "with a box without area"
    if x >= image["width"] or y >= image["height"] or x + width <= 0 or y + height <= 0:
        return "with a box outside the image"
    return None


def _complete(annotation: dict[str, Any], images: dict[int, dict[str, Any]], file: Path) -> dict[str, Any]:
    """Return the annotation with an area, which the evaluator requires but some programs omit."""
    full = {name: value for name, value in annotation.items() if name != "object"}
    if full.get("area") is None:
        image = images[full["image_id"]]
        size = (image["height"], image["width"])
        box_area = full["bbox"][2] * full["bbox"][3]
        segmentation = full.get("segmentation")
        full["area"] = float(mask_library().area(run_lengths(segmentation, size))) if segmentation else box_area
    if not is_finite(full["area"]):
        raise ValueError(
            f"{file}: annotation {full['id']} has the area {full['area']!r:.80}: use a finite number, or omit it"
        )
    return full


def is_finite(value: Any) -> bool:
    """True if `value` is a finite number; integers in JSON may be too large for a float."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False
