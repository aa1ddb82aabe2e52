# SPDX-License-Identifier: Apache-2.0
"""Classify a picture: `python onnx_classify.py model.onnx PICTURE.jpg`, with onnxruntime, NumPy and Pillow only.

The file is written by `sola export runs/few_images --format onnx --out model.onnx`; its metadata has the
classes and the preprocessing of pictures.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def prepare(picture, how):
    """Resize the shorter side, crop the central square, normalise: [1, 3, crop, crop]."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255
        picture = Image.fromarray((np.asarray(picture).astype(np.float32) / 65535 * 255).round().astype(np.uint8))
    picture = picture.convert("RGB")
    short = min(picture.size)
    size = [how["resize"] * side // short for side in picture.size]
    picture = picture.resize(size, Image.Resampling[how["interpolation"].upper()])
    left, top = (round((side - how["crop"]) / 2) for side in size)
    picture = picture.crop((left, top, left + how["crop"], top + how["crop"]))
    pixels = (np.asarray(picture, np.float32) / 255 - how["mean"]) / how["std"]
    return pixels.transpose(2, 0, 1)[None].astype(np.float32)


def classify(model, picture):
    """Return pairs (class, probability), the most likely first."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = {name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    (logits,) = session.run(None, {"images": prepare(picture, about["preprocess"])})
    weights = np.exp(logits[0] - logits[0].max())
    ranked = np.argsort(-weights)
    return [(about["classes"][i], float(weights[i] / weights.sum())) for i in ranked]


def stop(reason):
    """End with the usage and the reason in one line and exit code 2."""
    print(f"usage: python onnx_classify.py model.onnx PICTURE.jpg; {reason}", file=sys.stderr)
    sys.exit(2)


def main():
    if len(sys.argv) != 3:
        stop(f"it takes two arguments (got {len(sys.argv) - 1})")
    model, picture = sys.argv[1:]
    try:
        best = classify(model, Image.open(picture))[:3]
    except Exception as error:  # onnxruntime and Pillow raise many kinds
        stop(f"{type(error).__name__}: {' '.join(str(error).split())}")
    for name, probability in best:
        print(f"{100 * probability:5.1f} %  {name}")


if __name__ == "__main__":
    main()
