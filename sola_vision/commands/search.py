# SPDX-License-Identifier: Apache-2.0
"""`sola search --data FOLDER --budget COST`: search for the layers that should use softmax attention.

The budget is the cost of a network (its schedule, followed by its bridges if any), MACs such as 43.9M or 1.9G, or
a time such as 12.5ms, measured on this machine. Prints the best schedule in the same form, and writes search.json,
recipe.yaml and, if the method trains networks, curve.png to --out. Repeat the command to continue an interrupted
search.
"""

import json
import os
import re
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from sola_vision.commands.arguments import Arguments, check_minimum, parse_size
from sola_vision.config import SolaConfig
from sola_vision.engine import distributed
from sola_vision.engine.log import surroundings, write_json
from sola_vision.search import METHODS, Costs, Found, Problem, Space, latency_costs, mac_costs, search
from sola_vision.search.figures import draw_search
from sola_vision.studies import SCALES, Scale
from sola_vision.studies.images import Images
from sola_vision.tasks import ModelConfig
from sola_vision.wording import amount

_CHOOSE_SHARE = 0.1  # of the training images, held out to compare schedules
_COSTS = "costs.json"


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = _parse(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("sola search runs in one process: start it without torchrun")
    scale = SCALES[options.scale]
    space = Space(options.space, options.bridges)
    wanted = _parse_budget(options, space)
    if options.data is None:
        raise ValueError("sola search needs --data: a folder with train/ and val/, or a .tar of them")
    images = Images(options.data, scale.size, scale.images, options.limit or scale.limit, options.classes)
    base = scale.hierarchical if "/" in options.space else scale.isotropic
    config = _network_config(base, space, images.identity.classes)
    _check_same_search(Path(options.out), _settings(options, images))
    costs = _costs(options, config, space)
    budget = costs.of(wanted) if isinstance(wanted, str) else wanted
    costs.meeting(budget)
    problem = _problem(options, scale, images, config, costs, budget)
    _write_settings(problem.out, _settings(options, images), costs)

    found = search(problem, options.method, lambda text: print(text, file=sys.stderr))
    _write_results(problem, found, options, scale, images)
    if options.json:
        print((problem.out / "search.json").read_text(), end="")
        return
    print(f"{found.schedule} {found.bridges}".rstrip())
    print(
        f"{costs.text(found.cost)} for a budget of {costs.text(budget)} ({100 * (found.cost / budget - 1):+.2f} %); "
        f"the search took {found.trainings:.2f} trainings; "
        f"search.json{', curve.png' * bool(found.points)} and recipe.yaml are in {problem.out}",
        file=sys.stderr,
    )


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = Arguments("sola search", __doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder or .tar with train/CLASS/ and val/CLASS/ images, or the word digits")
    parser.add_argument("--budget", required=True, help="a schedule, or 43.9M, 1.9G (MACs), or 12.5ms (measured)")
    parser.add_argument(
        "--space", default="LL/LL/??????/LL", help="a schedule with ? for open layers (default: %(default)s)"
    )
    parser.add_argument("--method", choices=METHODS, default="gates", help="default: %(default)s")
    parser.add_argument("--bridges", action="store_true", help="also choose bridges from earlier stages")
    parser.add_argument("--size", help="HxW of the images at which the cost is counted or measured")
    parser.add_argument(
        "--latency", action="store_true", help="if the budget is a schedule, measure its time instead of counting MACs"
    )
    parser.add_argument(
        "--scale", choices=tuple(SCALES), default="small", help="network, images and length of a training"
    )
    parser.add_argument("--classes", metavar="FILE", help="names of the classes to use, one per line")
    parser.add_argument("--epochs", type=int, help="epochs of one training (default: the scale's)")
    parser.add_argument("--limit", type=int, help="number of training images, balanced by class (default: the scale's)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of weights, gates and samples")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: CUDA if available)")
    parser.add_argument("--out", default="runs/search", help="output folder (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print search.json on standard output")
    options = parser.parse_args(list(arguments))
    check_minimum(options, epochs=1, limit=1)
    return options


def _network_config(base: SolaConfig, space: Space, classes: int) -> SolaConfig:
    stages = space.template.count("/") + 1
    if stages != len(base.dims):
        raise ValueError(
            f"space {space.template!r} has {amount(stages, 'stage')} but the scale's network has {len(base.dims)}: "
            "give one group of letters for each stage"
        )
    return space.config(base, "L" * space.size).with_changes(num_classes=classes)


def _costs(options: Namespace, config: SolaConfig, space: Space) -> Costs:
    size = parse_size(options.size) if options.size else (config.img_size, config.img_size)
    if options.latency or options.budget.strip().endswith("ms"):
        known = Path(options.out) / _COSTS
        if known.exists():  # of the interrupted search: another measurement would change the search
            content = json.loads(known.read_text())
            return Costs(space, content["base"], tuple(content["extra"]), content["unit"])
        device = "cuda" if options.device == "auto" and torch.cuda.is_available() else options.device
        return latency_costs(config, space, size, "cpu" if device == "auto" else device)
    return mac_costs(config, space, size)


def _parse_budget(options: Namespace, space: Space) -> str | float:
    """Parse --budget: the kinds of the open layers of a schedule, or MACs, or seconds."""
    text = options.budget.strip()
    schedule, _, bridges = text.partition(" ")
    if schedule and set(schedule) <= set("LS/"):
        _check_stages(schedule, space.template)
        return space.kinds(schedule, bridges)
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)(M|G|ms)", text)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"--budget {text!r} must be a schedule, MACs such as 43.9M or 1.9G, or time such as 12.5ms")
    if options.latency and match[2] != "ms":
        raise ValueError(f"--budget {text} counts MACs but --latency measures time: give one of the two")
    return float(match[1]) * {"M": 1e6, "G": 1e9, "ms": 1e-3}[match[2]]


def _check_stages(schedule: str, template: str) -> None:
    """Raise ValueError, with the first difference, if --budget is not a schedule of --space."""
    stages, wanted = schedule.split("/"), template.split("/")
    problem = f"the number of its stages is {len(stages)}, not {len(wanted)}" if len(stages) != len(wanted) else None
    for number, (given, layers) in enumerate(zip(stages, wanted, strict=False), 1):
        if problem is None and len(given) != len(layers):
            problem = f"the length of its stage {number} is {len(given)}, not {len(layers)}"
        elif problem is None and any(layer not in ("?", kind) for layer, kind in zip(layers, given, strict=True)):
            problem = f"its stage {number} is {given}, not {layers}"
    if problem is not None:
        raise ValueError(
            f"--budget {schedule} does not fit the space {template}: {problem}; change it or --space, or give a "
            "cost such as 43.9M"
        )


def _problem(
    options: Namespace, scale: Scale, images: Images, config: SolaConfig, costs: Costs, budget: float
) -> Problem:
    network = "hierarchical" if len(config.dims) > 1 else "isotropic"
    epochs = options.epochs or scale.epochs.get(network, 300)
    train = replace(scale.train, epochs=epochs, seed=options.seed, device=options.device)
    if train.warmup_epochs >= epochs:
        train = replace(train, warmup_epochs=epochs / 10)
    train_set, choose_set = images.split(_CHOOSE_SHARE)
    problem = Problem(
        config=config,
        costs=costs,
        budget=budget,
        train=train,
        image=images.settings,
        train_set=train_set,
        choose_set=choose_set,
        out=Path(options.out),
    )
    if options.method != "rule" and problem.num_train < train.batch_size:  # the rule trains nothing
        raise ValueError(
            f"{options.data}: {amount(problem.num_train, 'training image')}, fewer than one batch of "
            f"{train.batch_size}: give more images"
        )
    return problem


def _settings(options: Namespace, images: Images) -> dict[str, Any]:
    free = ("out", "json", "device", "data")
    return {k: v for k, v in vars(options).items() if k not in free} | {"images": images.identity.fingerprint}


def _check_same_search(out: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError if the folder contains another search; the same command continues it."""
    path = out / "settings.json"
    if not path.exists():
        return
    before = json.loads(path.read_text())
    for name in settings | before:
        if before.get(name) != settings.get(name):
            raise ValueError(
                f"{out} contains a search with {name} {before.get(name)!r}, not {settings.get(name)!r}: choose another "
                "--out"
            )


def _write_settings(out: Path, settings: dict[str, Any], costs: Costs) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "settings.json", settings)  # first: costs.json is only valid with its settings
    write_json(out / _COSTS, {"base": costs.base, "extra": list(costs.extra), "unit": costs.unit})


def _write_results(problem: Problem, found: Found, options: Namespace, scale: Scale, images: Images) -> None:
    costs = problem.costs
    with distributed(problem.train.device) as world:
        where = surroundings(world.device, 1)
    del where["peak_memory_mib"]  # of this process, which has trained nothing if the search was complete
    document = {
        **asdict(found),
        "space": costs.space.template,
        "unit": costs.unit,
        "budget": problem.budget,
        "off_budget_percent": round(100 * (found.cost / problem.budget - 1), 3),
        "seed": options.seed,
        "scale": scale.name,
        "images": images.describe(),
        **where,
    }
    write_json(problem.out / "search.json", document)
    if found.points:  # the rule evaluates nothing
        draw_search(found, costs, problem.budget, problem.out / "curve.png")
    (problem.out / "recipe.yaml").write_text(_recipe(problem, found, options.data, images), encoding="utf-8")


def _recipe(problem: Problem, found: Found, data: str, images: Images) -> str:
    """Return a file for `sola train --config`: the network found, from scratch, on all training images."""
    model = ModelConfig.of(problem.config.with_changes(schedule=found.schedule, bridges=found.bridges))
    sections = {"model": asdict(model), "image": asdict(images.settings), "train": asdict(problem.train)}
    content = {"recipe": "imagenet_tiny", "data": data, **sections}
    head = (
        f"# the schedule that sola search ({found.method}) found; train it with\n"
        "#   sola train --config recipe.yaml --out FOLDER\n"
    )
    return head + yaml.safe_dump(json.loads(json.dumps(content)), sort_keys=False)
