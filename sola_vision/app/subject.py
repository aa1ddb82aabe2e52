# SPDX-License-Identifier: Apache-2.0
"""A network on the page: its predictions for a picture, and the maps of its layers.

It comes from a checkpoint of any task, or from a name with random weights, which has maps but no predictions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from sola_vision.analysis.trace import Patch, activation, eigencam, feature_maps, patches
from sola_vision.data import EvalTransform, ImageConfig
from sola_vision.tasks import load_checkpoint, read_description

_SHOWN = 5  # classes
_NAMES = ("sola_nano", "sola_tiny", "sola_small", "sola_base")
_SIDE = 320  # pixels of a map's longer side on the page


@dataclass(frozen=True)
class Prediction:
    """Shares of the predicted classes (which need not sum to 1), and the picture with the prediction drawn in."""

    shares: dict[str, float]
    picture: Image.Image | None = None


@dataclass(frozen=True)
class Subject:
    """A network, the normalisation of its input, and its prediction function."""

    label: str
    backbone: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]
    predict: Callable[[Image.Image], Prediction]

    @torch.inference_mode()
    def layer_maps(self, picture: Image.Image, longest: int) -> list[tuple[str, Image.Image, Image.Image]]:
        """Return every layer's name, EigenCAM over the picture, and activation, for the picture at `longest` pixels."""
        scale = longest / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        seen = picture.resize(size, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.asarray(seen, np.float32).copy()).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        maps = feature_maps(self.backbone, ((pixels - mean) / std)[None])
        views = []
        for name, (down, across) in patches(self.backbone, (seen.height, seen.width), maps).items():
            patch = (down / seen.height, across / seen.width)
            cam, strength = eigencam(maps[name])[0], activation(maps[name])[0]
            views.append((name, _draw_map(cam, patch, picture, 0.6), _draw_map(strength, patch, picture, 1.0)))
        return views


def names(sources: list[str]) -> list[str]:
    """Return the choices: the given checkpoints, then those in runs/ of the current folder, then names."""
    runs = sorted(str(path.parent) for path in Path("runs").glob("*/best.safetensors"))
    return list(dict.fromkeys([*sources, *runs, *_NAMES]))


def load(source: str) -> Subject:
    """Load a checkpoint, a run's folder or a name. Raise ValueError or OSError of one line for anything else."""
    if not Path(source).exists() and timm.is_model(source):
        return _fresh(source)
    task = read_description(source)[1]["task"]
    loaders: dict[str, Callable[[str], Subject]] = {
        "classification": _classifier,
        "segmentation": _segmenter,
        "detection": _detector,
    }
    if task not in loaders:
        raise ValueError(f"{source}: task {task!r} is not supported by this version ({', '.join(loaders)})")
    return loaders[task](source)


def _fresh(name: str) -> Subject:
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=0).eval()
    image = ImageConfig()
    return Subject(f"{name}, random weights", model, image.mean, image.std, lambda picture: Prediction({}))


def _classifier(source: str) -> Subject:
    checkpoint = load_checkpoint(source)
    transform = EvalTransform(checkpoint.image)

    @torch.inference_mode()
    def predict(picture: Image.Image) -> Prediction:
        probabilities = checkpoint.model(transform(picture)[None]).float().softmax(1)[0]
        best = probabilities.topk(min(_SHOWN, len(checkpoint.classes)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return Prediction({checkpoint.classes[index]: share for index, share in pairs})

    image = checkpoint.image
    return Subject(f"{checkpoint.name} of {source}", checkpoint.model, image.mean, image.std, predict)


def _segmenter(source: str) -> Subject:
    from sola_vision.data import SegmentationEvalTransform
    from sola_vision.tasks.inference import Inference
    from sola_vision.tasks.label_pictures import class_shares, draw_overlay
    from sola_vision.tasks.segmenter import backbone_of, load_segmenter

    checkpoint = load_segmenter(source)
    transform, infer = SegmentationEvalTransform(checkpoint.image), Inference()

    @torch.inference_mode()
    def predict(picture: Image.Image) -> Prediction:
        classes = infer(checkpoint.model, transform.image(picture), (picture.height, picture.width)).numpy()
        shares = {checkpoint.classes[index]: share for index, share in class_shares(classes)[:_SHOWN]}
        return Prediction(shares, draw_overlay(picture, classes, checkpoint.classes))

    mean, std = _normalisation(checkpoint.image)
    return Subject(f"{checkpoint.name} of {source}", backbone_of(checkpoint.model), mean, std, predict)


def _detector(source: str) -> Subject:
    from sola_vision.data import mask_library, to_pixels
    from sola_vision.tasks.box_pictures import Shape, draw_shapes, shape_of
    from sola_vision.tasks.detection import to_results
    from sola_vision.tasks.detector import backbone_of, detect, load_detector

    library = mask_library()
    checkpoint = load_detector(source)
    checkpoint.model.roi_heads.score_thresh = 0.5
    labels = {number: label for label, number in enumerate(checkpoint.category_ids)}

    def predict(picture: Image.Image) -> Prediction:
        found = detect(checkpoint.model, [to_pixels(picture)])[0]
        shapes: list[Shape] = []
        shares: dict[str, float] = {}
        for result in to_results(found, 1, (picture.height, picture.width), checkpoint.category_ids):
            mask = library.decode(result["segmentation"]) if "segmentation" in result else None
            shapes.append(shape_of(result, labels, mask))
            name = checkpoint.classes[shapes[-1].label]
            shares[name] = max(shares.get(name, 0.0), float(result["score"]))
        best = sorted(shares, key=lambda name: -shares[name])[:_SHOWN]
        return Prediction({name: shares[name] for name in best}, draw_shapes(picture, shapes, checkpoint.classes))

    mean, std = _normalisation(checkpoint.image)
    return Subject(f"{checkpoint.name} of {source}", backbone_of(checkpoint.model), mean, std, predict)


def _normalisation(image: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    default = ImageConfig()
    return tuple(getattr(image, "mean", default.mean)), tuple(getattr(image, "std", default.std))


def _draw_map(values: Tensor, patch: Patch, picture: Image.Image, opacity: float) -> Image.Image:
    """Draw a map [h, w], in colours from its smallest to its largest value, over the picture, each token on its pixels.

    patch: size of a token as fractions of the picture's height and width.
    """
    low, high = values.min(), values.max()
    scaled: NDArray[np.float64] = ((values - low) / (high - low if high > low else 1.0)).cpu().numpy()
    colours = Image.fromarray((colormaps["viridis"](scaled)[..., :3] * 255).astype(np.uint8))
    scale = _SIDE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # smooth as a tint over the picture, with visible tokens on its own
    resampling = Image.Resampling.BICUBIC if opacity < 1 else Image.Resampling.NEAREST
    below = picture.convert("RGB").resize(size)
    # some networks pad beyond the picture, others ignore its last pixels: draw the part that both have
    box = (0.0, 0.0, min(colours.width, 1 / patch[1]), min(colours.height, 1 / patch[0]))
    part = (max(1, round(size[0] * box[2] * patch[1])), max(1, round(size[1] * box[3] * patch[0])))
    tint = colours.resize(part, resampling, box)
    below.paste(Image.blend(below.crop((0, 0, *part)), tint, opacity))
    return below
