# SPDX-License-Identifier: Apache-2.0
"""`sola explain IMAGE --checkpoint FILE`: what each layer of a network does with an image, as pictures and numbers.

Writes sheet.png (all maps), page.html (one file; a click on the image moves the chosen point) and maps.npz (arrays).
IMAGE may be the word multiscale: a generated scene with one object at five scales, and the share of each map on it.
"""

import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from sola_vision.analysis.explain import LayerView, arrays, explain
from sola_vision.analysis.multiscale import MultiScale, energy_shares, multiscale_image
from sola_vision.analysis.page import write_page
from sola_vision.analysis.receptive import decay_ranges
from sola_vision.analysis.sheet import draw_sheet
from sola_vision.backbone import SolaVision
from sola_vision.commands.arguments import Arguments, check_minimum, image_files, out_folder, parse_size, plain
from sola_vision.commands.results import write_csv
from sola_vision.commands.tables import new_table, show_table
from sola_vision.data import ImageConfig, read_image
from sola_vision.engine.log import json_text, surroundings, write_json
from sola_vision.tasks import load_checkpoint, takes_one_size

_SEED = 0  # of random weights
_FIELD_IMAGES = 8  # most images that a receptive field is averaged over


@dataclass(frozen=True)
class Network:
    """A network to explain, its label and its image settings."""

    label: str
    model: nn.Module
    image: ImageConfig
    fixed_side: int | None = None  # in pixels, of a network that takes no other size


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = _parse(arguments)
    out = out_folder(options.out)
    picture, scene, given = _picture(options)
    point = _point(options.point, given, picture)
    field_images = _field_images(options)
    networks = _networks(options)
    _check_sizes(options, networks, picture)
    out.mkdir(parents=True, exist_ok=True)
    explained = [
        (n.label, explain(n.model, _normalised(picture, n.image), point, elsewhere=not options.no_page))
        for n in networks
    ]
    title = f"{Path(options.image).name}, {picture.shape[1]} x {picture.shape[0]} pixels"
    draw_sheet(picture, point, explained, out / "sheet.png", f"{' | '.join(n.label for n in networks)}\n{title}")
    if not options.no_page:
        write_page(picture, point, explained, out / "page.html", f"{explained[0][0]}: {title}")
    saved: dict[str, Any] = {"image": picture, "point": np.array(point)}
    for label, views in explained:
        prefix = f"{label}/" if len(explained) > 1 else ""
        saved |= {prefix + name: values for name, values in arrays(views).items()}
    if scene is not None:
        saved |= {"masks": scene.masks, "boxes": scene.boxes}
    np.savez_compressed(out / "maps.npz", **saved)
    result: dict[str, Any] = {
        "image": options.image,
        "height": picture.shape[0],
        "width": picture.shape[1],
        "point": {"x": point[1], "y": point[0]},
        "checkpoint": options.checkpoint,
        "compared": options.compare,
        **surroundings(torch.device("cpu"), 1),
        "networks": [
            _numbers(network, views, picture, scene) for network, (_, views) in zip(networks, explained, strict=True)
        ],
    }
    if field_images:
        _receptive_fields(field_images, networks, out, result)
    write_json(out / "explain.json", result)
    _write_layers(result, out / "layers.csv")
    if options.json:
        print(json_text(result))
    else:
        _print(result, scene)
        page = "" if options.no_page else "page.html, "
        print(f"sheet.png, {page}maps.npz, explain.json and layers.csv are in {out}")


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = Arguments("sola explain", __doc__)
    parser.add_argument("image", help="an image file, or the word multiscale")
    parser.add_argument("--checkpoint", help="best.safetensors, or a run's folder")
    parser.add_argument("--model", help="instead of a checkpoint: a network with random weights (default: sola_tiny)")
    parser.add_argument("--schedule", help="with --model: layers of every stage, such as LL/LL/LLLLLL/LL")
    parser.add_argument("--bridges", help='with --model: Hidden State Bridges, such as "1.2>3.3", or the word paper')
    parser.add_argument("--compare", metavar="WHAT", help="compare with another checkpoint, a schedule (random "
                        "weights), or the word random (the same network untrained)")  # fmt: skip
    parser.add_argument(
        "--point",
        metavar="X,Y",
        help="the chosen point, in pixels of the original image, before --size (default: its centre)",
    )
    parser.add_argument(
        "--size", metavar="HxW", help="resize the image first; one number: the longer side (default: no resizing)"
    )
    parser.add_argument("--field", metavar="IMAGES", help="also compute the effective receptive field, averaged over "
                        f"up to {_FIELD_IMAGES} images of this folder (or over one image)")  # fmt: skip
    parser.add_argument("--field-size", type=int, default=224, help="side of the images of --field in pixels")
    parser.add_argument("--no-page", action="store_true", help="do not write page.html, which takes most of the time")
    parser.add_argument("--out", default="explain", help="output folder (default: explain)")
    parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    options = parser.parse_args(list(arguments))
    if options.checkpoint and (options.model or options.schedule or options.bridges is not None):
        raise ValueError("--checkpoint defines the network: leave out --model, --schedule and --bridges")
    check_minimum(options, field_size=16)
    return options


def _networks(options: Namespace) -> list[Network]:
    first = _checkpoint(options.checkpoint) if options.checkpoint else _fresh(options)
    if options.compare is None:
        return [first]
    if options.compare == "random":
        if not options.checkpoint:
            raise ValueError("--compare random needs a checkpoint: give --checkpoint")
        if not isinstance(first.model, SolaVision):
            raise ValueError(
                f"--compare random needs a SoLA network, but {first.label} is a {type(first.model).__name__}"
            )
        torch.manual_seed(_SEED)
        return [first, Network("random weights", SolaVision(first.model.config).eval(), first.image)]
    if re.fullmatch(r"[LS/]+", options.compare):
        if not isinstance(first.model, SolaVision):
            raise ValueError(f"--compare {options.compare} needs a SoLA network, but {first.label} is not one")
        # without bridges: another schedule may lack the layers that they connect
        config = first.model.config.with_changes(schedule=options.compare, bridges="")
        torch.manual_seed(_SEED)
        return [first, Network(f"{options.compare} (random weights)", SolaVision(config).eval(), first.image)]
    second = _checkpoint(options.compare)
    if second.label == first.label:
        first = Network(f"{first.label} (first)", first.model, first.image)
        second = Network(f"{second.label} (second)", second.model, second.image)
    return [first, second]


def _checkpoint(path: str) -> Network:
    checkpoint = load_checkpoint(path)
    folder = Path(path)
    name = folder.name if folder.is_dir() else folder.parent.name or folder.stem
    fixed_side = checkpoint.image.size if takes_one_size(checkpoint.name) else None
    return Network(f"{checkpoint.name} ({name})", checkpoint.model, checkpoint.image, fixed_side)


def _fresh(options: Namespace) -> Network:
    name = options.model or "sola_tiny"
    if not timm.is_model(name):
        raise ValueError(f"--model {name!r} is unknown: use sola_nano, sola_tiny, sola_small, sola_base or a timm name")
    changes = {n: getattr(options, n) for n in ("schedule", "bridges") if getattr(options, n) is not None}
    if changes and not name.startswith("sola_"):
        raise ValueError(f"{name} has no {' and no '.join(changes)}: only the sola_* networks have them")
    torch.manual_seed(_SEED)
    model = timm.create_model(name, num_classes=0, **changes).eval()
    fixed_side = timm.get_pretrained_cfg(name).input_size[-1] if takes_one_size(name) else None
    return Network(
        f"{name} {options.schedule or ''} (random weights)".replace("  ", " "), model, ImageConfig(), fixed_side
    )


def _check_sizes(options: Namespace, networks: list[Network], picture: NDArray[np.uint8]) -> None:
    """Raise ValueError, before any work, if a network does not take images of this size."""
    for network in networks:
        side, (height, width) = network.fixed_side, picture.shape[:2]
        if side and (height, width) != (side, side):
            raise ValueError(
                f"{options.image} has {height}x{width} pixels (HxW), but {network.label} takes only {side}x{side}: "
                f"give --size {side}x{side}"
            )
        if side and options.field and options.field_size != side:
            raise ValueError(f"--field-size {options.field_size}: {network.label} takes only {side}; give {side}")


def _picture(options: Namespace) -> tuple[NDArray[np.uint8], MultiScale | None, tuple[int, int]]:
    """Return the networks' input image, the scene if it is generated, and (height, width) of the original image."""
    if options.image == "multiscale":
        height, width = parse_size(options.size or "512")
        if height != width:
            raise ValueError(f"--size {options.size}: the multiscale image is square; give one number")
        scene = multiscale_image(height)
        return scene.image, scene, (height, height)
    picture = _read(options.image)
    given = picture.height, picture.width
    if options.size:
        height, width = parse_size(options.size)
        if "x" not in options.size.lower():
            longer = max(picture.size)
            width, height = (max(1, round(side * height / longer)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture).copy(), None, given


def _read(path: str) -> Image.Image:
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder: give one image file")
    try:
        return read_image(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such image; give an image file, or the word multiscale") from None
    except OSError as error:
        raise type(error)(f"{path} cannot be read ({error.strerror}): give another image file") from None


def _field_images(options: Namespace) -> list[NDArray[np.uint8]]:
    """Return the images of --field at --field-size; an empty list without it."""
    if not options.field:
        return []
    try:
        files = image_files(Path(options.field))
    except (ValueError, OSError) as error:
        raise type(error)(f"--field {error}; give an image, or a folder of images") from None
    # evenly spaced, since names often sort by class
    files = files[:: max(1, len(files) // _FIELD_IMAGES)][:_FIELD_IMAGES]
    side = (options.field_size, options.field_size)
    return [np.asarray(_read(str(file)).resize(side, Image.Resampling.BICUBIC)).copy() for file in files]


def _point(text: str | None, given: tuple[int, int], picture: NDArray[np.uint8]) -> tuple[float, float]:
    """Convert "X,Y" in an image of `given` (height, width) to (y, x) in the resized picture; None: its centre."""
    if text is None:
        return picture.shape[0] / 2, picture.shape[1] / 2
    height, width = given
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*,\s*(\d+(?:\.\d+)?)\s*", text)
    if match is None:
        raise ValueError(f"--point {text!r} must be X,Y in pixels, such as {width // 2},{height // 2}")
    x, y = float(match[1]), float(match[2])
    if not (x < width and y < height):
        raise ValueError(
            f"--point {text}: the image has {width} x {height} pixels; give x from 0 to {width - 1}, and y from 0 at "
            f"the top to {height - 1}"
        )
    return y * picture.shape[0] / height, x * picture.shape[1] / width


def _normalised(picture: NDArray[np.uint8], image: ImageConfig) -> Tensor:
    pixels = torch.from_numpy(picture).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (image.mean, image.std))
    return (pixels - mean) / std


def _numbers(
    network: Network, views: list[LayerView], picture: NDArray[np.uint8], scene: MultiScale | None
) -> dict[str, Any]:
    layers = []
    size = (picture.shape[0], picture.shape[1])
    ranges = {r.layer: r for r in decay_ranges(network.model, size)} if isinstance(network.model, SolaVision) else {}
    for view in views:
        row: dict[str, Any] = {"layer": view.name} | view.numbers(size)
        if view.name in ranges:
            decay = ranges[view.name]
            row["decay_median"] = decay.decays[0.5]
            row["decay_growing"] = 100 * decay.growing
            # infinite, and null in JSON, where the weight of the median channel does not decay with distance
            row["range_rows"] = decay.pixels(0.5) if decay.decays[0.5] > 0 else None
        if scene is not None:
            for name, energy in (("activation", view.activation**2), ("eigencam", view.eigencam.clip(min=0) ** 2)):
                shares = energy_shares(torch.from_numpy(energy), scene.masks, view.patch)
                row[f"{name}_on_objects"] = [100 * share for share, _ in shares]
                row[f"{name}_over_chance"] = [share / area for share, area in shares]
        layers.append(row)
    return {"network": network.label, "layers": layers}


def _receptive_fields(
    pictures: list[NDArray[np.uint8]], networks: list[Network], out: Path, result: dict[str, Any]
) -> None:
    from sola_vision.analysis.figures import draw_fields
    from sola_vision.analysis.receptive import effective_receptive_field, field_statistics

    saved: dict[str, Any] = {}
    drawn = []
    for network in networks:
        images = [_normalised(picture, network.image) for picture in pictures]
        ways = [("", False)]
        if isinstance(network.model, SolaVision) and "S" in network.model.config.schedule:
            ways.append((", softmax attention left out", True))
        for suffix, without in ways:
            fields = effective_receptive_field(network.model, images, without_softmax=without)
            drawn.append((network.label + suffix, fields))
            saved |= {f"{network.label}{suffix}/{name}": field.map for name, field in fields.items()}
            rows = [
                {"layer": name, "rows": s.rows, "columns": s.columns}
                | {f"area_{share:g}": 100 * area for share, area in s.areas.items()}
                for name, s in ((n, field_statistics(f)) for n, f in fields.items())
            ]
            side = len(pictures[0])
            entry = {"network": network.label + suffix, "images": len(pictures), "size": side, "layers": rows}
            result.setdefault("receptive_fields", []).append(entry)
    np.savez_compressed(out / "fields.npz", **saved)
    draw_fields(drawn, out / "fields.png")


def _write_layers(result: dict[str, Any], path: Path) -> None:
    rows = [{"network": n["network"]} | layer for n in result["networks"] for layer in n["layers"]]
    for row in rows:
        for name in [name for name, value in row.items() if isinstance(value, list)]:
            row |= {f"{name}_{i}": value for i, value in enumerate(row.pop(name), start=1)}
    write_csv(path, rows)


def _print(result: dict[str, Any], scene: MultiScale | None) -> None:
    for network in result["networks"]:
        columns = {
            "layer": "layer",
            "activation_area": "activation covers %",
            "activation_smoothness": "smoothness",
            "read_area": "point reads %",
            "read_own": "itself %",
            "read_rows": "rms px up/down",
            "read_columns": "left/right",
            "decay_median": "median w",
            "range_rows": "its range, px",
        }
        table = new_table(plain(network["network"]), *columns.values())
        for layer in network["layers"]:
            cells = [layer.get(name) for name in columns]
            table.add_row(*("-" if v is None else v if isinstance(v, str) else f"{v:.2f}" for v in cells))
        show_table(table, 120)
        if scene is not None:
            areas = ", ".join(f"{100 * mask.mean():.2f}" for mask in scene.masks)
            title = f"energy on the five objects over their share of the area ({areas} %)"
            kinds = (f"{kind}: largest" for kind in ("activation", "EigenCAM"))
            table = new_table(title, "layer", *(name for kind in kinds for name in (kind, "2", "3", "4", "smallest")))
            for layer in network["layers"]:
                cells = [*layer["activation_over_chance"], *layer["eigencam_over_chance"]]
                table.add_row(layer["layer"], *(f"{value:.2f}" for value in cells))
            show_table(table, 120)
