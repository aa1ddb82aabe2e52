# SPDX-License-Identifier: Apache-2.0
"""The page of `sola explain`: one self-contained HTML file in which a click on the image moves the chosen point.

The maps of a grid of points are embedded as bytes; `page.html` next to this file is the template.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image

from sola_vision.analysis.explain import LayerView

_PICTURE = 900  # the longer side, in pixels, of the page's copy of the image
_STATIC = 64  # the largest side, in tokens, of its activation and EigenCAM maps


def write_page(
    image: NDArray[np.uint8],
    point: tuple[float, float],
    networks: Sequence[tuple[str, Sequence[LayerView]]],
    out: Path,
    title: str,
) -> None:
    """Write the page for an image [H, W, 3] and a point (y, x).

    networks: (label, views) of each; views of SoLA networks must come from `explain(..., elsewhere=True)`.
    """
    height, width = image.shape[:2]
    known = [max(map(len, view.known)) for _, views in networks for view in views]
    data = {
        "width": width,
        "height": height,
        "start": [point[1] / width, point[0] / height],
        "steps": max(1, *known),
        "picture": _picture(image),
        "rising": _ramp("cividis"),
        "two_sided": _ramp("PuOr_r"),
        "networks": [
            {"label": label, "layers": [_layer(view, (height, width)) for view in views]} for label, views in networks
        ],
    }
    template = resources.files("sola_vision.analysis").joinpath("page.html").read_text(encoding="utf-8")
    # "</" would end the script element that contains the data
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    # title first, since the data may contain its placeholder
    head, _, tail = template.replace("__TITLE__", html.escape(title)).partition("__DATA__")
    out.write_text(head + text + tail, encoding="utf-8", errors="replace")


def _layer(view: LayerView, image: tuple[int, int]) -> dict[str, Any]:
    low, high = float(view.activation.min()), float(view.activation.max())
    reach = max(float(np.abs(view.eigencam).max()), 1e-12)
    layer: dict[str, Any] = {
        "name": view.name,
        "kind": "WKV weights" if view.name.endswith("L") else "attention",
        # x before y, as in the page; patches as fractions of the image
        "tokens": view.activation.shape[::-1],
        "patch": [view.patch[1] / image[1], view.patch[0] / image[0]],
        "activation": _static_map(view.activation, low, high) | {"range": f"{low:.3g} to {high:.3g}"},
        "eigencam": _static_map(view.eigencam, -reach, reach) | {"range": f"-{reach:.3g} to {reach:.3g}"},
    }
    if view.elsewhere is not None:
        _, rows, columns = view.elsewhere.shape
        layer["reads"] = {"height": rows, "width": columns, "data": base64.b64encode(view.elsewhere.tobytes()).decode()}
        layer["reads"]["known"] = view.known[::-1]
    return layer


def _static_map(values: NDArray[np.float64], low: float, high: float) -> dict[str, Any]:
    rows, columns = (min(_STATIC, side) for side in values.shape)
    pooled = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(values)[None], (rows, columns))[0].numpy()
    scaled = np.rint(255 * (pooled - low) / max(high - low, 1e-12)).clip(0, 255).astype(np.uint8)
    return {"height": rows, "width": columns, "data": base64.b64encode(scaled.tobytes()).decode()}


def _picture(image: NDArray[np.uint8]) -> str:
    picture = Image.fromarray(image)
    picture.thumbnail((_PICTURE, _PICTURE))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _ramp(name: str) -> str:
    colours = colormaps[name](np.arange(256), bytes=True)[:, :3]
    return base64.b64encode(np.ascontiguousarray(colours).tobytes()).decode()
