# SPDX-License-Identifier: Apache-2.0
"""Options of a run: every field of a recipe as `--section.field`, from a YAML file, the command line or both.

Later wins: the recipe, then `--config FILE`, then the command line. Unknown fields and wrong types are errors of one
line.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser

from sola_vision.data import ImageConfig
from sola_vision.engine import TrainConfig
from sola_vision.recipes import RECIPES, Recipe, get_recipe
from sola_vision.tasks import ModelConfig

SECTIONS = {"model": ModelConfig, "image": ImageConfig, "train": TrainConfig}


@dataclass(kw_only=True)
class Run:
    """What `sola train` was asked for."""

    recipe: str
    configuration: Recipe
    data: str
    out: Path
    resume: bool
    json: bool
    text: str  # the whole configuration as YAML, which runs it again


def parse_run(arguments: Sequence[str]) -> Run:
    """The command line of `sola train`; prints and exits for --help and --print_config."""
    recipe = _recipe_name(arguments)
    parser = _parser(recipe, get_recipe(recipe))
    try:
        values = parser.parse_args(list(arguments))
    except argparse.ArgumentError as error:
        raise ValueError(_one_line(str(error))) from None
    if values.data is None:
        raise ValueError(
            f"sola train {recipe} needs --data: a folder with train/ and val/, a .tar of them, or the word digits"
        )
    configuration = Recipe(
        **{section: kind(**vars(getattr(values, section))) for section, kind in SECTIONS.items()}, init=values.init
    )
    # in the file so that it says all; where the next run goes is its own business
    text = parser.dump(values, skip_none=False)
    stored = yaml.safe_load(text)
    for name in ("config", "out", "resume", "json"):
        stored.pop(name, None)
    stored["recipe"] = recipe
    out = Path(values.out) if values.out else Path("runs") / recipe
    text = yaml.safe_dump(stored, sort_keys=False)
    return Run(
        recipe=recipe,
        configuration=configuration,
        data=values.data,
        out=out,
        resume=values.resume,
        json=values.json,
        text=text,
    )


def _recipe_name(arguments: Sequence[str]) -> str:
    """The recipe decides the defaults, so it has to be known before the rest can be read."""
    if arguments and not arguments[0].startswith("-"):
        return arguments[0]
    for index, word in enumerate(arguments):
        if word == "--config" and index + 1 < len(arguments):
            return _stored_recipe(Path(arguments[index + 1]))
        if word.startswith("--config="):
            return _stored_recipe(Path(word.removeprefix("--config=")))
    if any(word in ("-h", "--help", "--print_config") for word in arguments):
        return "imagenet_tiny"
    raise ValueError(f"sola train needs a recipe: {', '.join(RECIPES)}; or --config FILE of an earlier run")


def _stored_recipe(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: no such file; a run leaves config.yaml in its folder")
    try:
        stored = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not YAML: {error}") from None
    if not isinstance(stored, dict):
        raise ValueError(f"--config {path} must hold sections (model, image, train), it holds {type(stored).__name__}")
    return str(stored.get("recipe") or "imagenet_tiny")


def _parser(name: str, recipe: Recipe) -> ArgumentParser:
    lines = "\n".join(f"  {n:<16}{(make.__doc__ or '').splitlines()[0]}" for n, make in RECIPES.items())
    parser = ArgumentParser(
        prog="sola train",
        exit_on_error=False,
        description=f"Train a network by a recipe. The recipes:\n{lines}\n\nDefaults below are those of {name}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", nargs="?", help="one of the recipes above")
    parser.add_argument("--config", action="config", help="YAML file with any of the fields below")
    parser.add_argument("--data", type=str, default="digits" if name == "digits" else None,
                        help="folder or .tar with train/CLASS/ and val/CLASS/ images, or the word digits")  # fmt: skip
    parser.add_argument("--out", type=str, help="the run's folder (default: runs/RECIPE)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder")
    parser.add_argument(
        "--init", type=str, default=recipe.init, help="checkpoint whose weights the network starts from"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON document on standard output")
    for section, kind in SECTIONS.items():
        parser.add_class_arguments(kind, section)
        defaults = asdict(getattr(recipe, section))
        parser.set_defaults({f"{section}.{field.name}": defaults[field.name] for field in fields(kind)})
    return parser


def _one_line(message: str) -> str:
    """jsonargparse explains type errors in several lines; what a user needs is the option, the value and the type."""
    key = re.search(r'Parser key "([^"]+)"', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if key is None or value is None:
        return " ".join(message.split())
    kinds = re.search(r"Subtypes: \[(.*)\]", message) or re.search(r"Expected an? (.*?)\. Got", message)
    wanted = re.sub(r"<class '(\w+)'>", r"\1", kinds[1]).replace("NoneType", "null") if kinds else "another type"
    return f"--{key[1]} {value[1]!r} does not fit: it takes {wanted.replace(', null', ' or null')}"
