# SPDX-License-Identifier: Apache-2.0
"""Options of a run: every field of a recipe as `--section.field`, from a YAML file, the command line or both.

Later wins: the recipe, with --resume the run's own config.yaml, `--config FILE`, the command line. Unknown fields and
wrong types are errors of one line.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from sola_vision.engine.checkpoint import STATE
from sola_vision.recipes import RECIPES, AnyRecipe, get_recipe

_OPTIONS = ("recipe", "data", "init", "out", "resume", "json")
_FIRST = next(iter(RECIPES))  # whose defaults hold where no recipe is named


@dataclass(kw_only=True)
class Run:
    """What `sola train` was asked for."""

    recipe: str
    configuration: AnyRecipe
    data: str
    out: Path
    resume: bool
    json: bool

    @property
    def start(self) -> str | None:
        """The checkpoint that the weights start from; a run that ended before it had saved anything starts again."""
        return None if self.resume and (self.out / STATE).exists() else self.configuration.init

    @property
    def text(self) -> str:
        """The whole configuration as YAML, which runs it again; where the next run goes is its own business."""
        values = {"recipe": self.recipe, "data": self.data, **asdict(self.configuration)}
        return yaml.safe_dump(values, sort_keys=False)

    def changes(self, before: str) -> list[str]:
        """What is not as in an earlier `text`, for people, but for training's numbers, which the engine names."""
        then = _flat(before)
        now = {name: value for name, value in _flat(self.text).items() if not name.startswith("train.")}
        return [f"{k}={v} (was {then[k]})" for k, v in now.items() if k in then and v != then[k]]


def parse_run(arguments: Sequence[str]) -> Run:
    """The command line of `sola train`; prints and exits for --help and --print_config."""
    words = list(arguments)
    named = words.pop(0) if words and not words[0].startswith("-") else None
    files, words = _take(words, "--config")
    stored = [(file, _read_yaml(Path(file))) for file in files]
    recipe = named or _stored_recipe(stored)
    if "--resume" in words or _last(stored, "resume"):
        folder = (_take(words, "--out")[0] or [_last(stored, "out") or f"runs/{recipe}"])[-1]
        # a run goes on as it began, whatever the recipe says by now
        if (kept := Path(folder) / "config.yaml").is_file():
            stored.insert(0, (str(kept), _read_yaml(kept)))
            recipe = named or _stored_recipe(stored)
    if recipe is None:
        if not any(word in ("-h", "--help") or word.startswith("--print_config") for word in words):
            raise ValueError(
                f"sola train needs a recipe as its first word: {', '.join(RECIPES)}; or --config FILE of an earlier run"
            )
        recipe = _FIRST
    begun = get_recipe(recipe)
    sections = sections_of(begun)
    for file, content in stored:
        _check_names(file, content, sections)
    parser = _parser(recipe, begun)
    try:
        # files first, so that the command line wins wherever --config stands in it
        values = parser.parse_args([recipe, *(f"--config={file}" for file, _ in stored), *words])
    except argparse.ArgumentError as error:
        raise ValueError(_one_line(str(error), sections)) from None
    if values.data is None:
        raise ValueError(f"sola train {recipe} needs --data: {begun.data}")
    parts = {
        name: {field.name: getattr(values[name], field.name) for field in fields(kind)}
        for name, kind in sections.items()
    }
    made = {name: _section(name, sections[name], part) for name, part in parts.items()}
    configuration = type(begun)(**made, init=values.init)
    out = Path(values.out) if values.out else Path("runs") / recipe
    return Run(
        recipe=recipe,
        configuration=configuration,
        data=values.data,
        out=out,
        resume=values.resume,
        json=values.json,
    )


def _section(name: str, kind: type, values: dict[str, Any]) -> Any:
    """A section of a recipe. What it refuses begins with the field's name, of which the option is made here."""
    try:
        return kind(**values)
    except ValueError as error:
        text = str(error).removeprefix(f"{name}.")
        field = re.match(r"\w*", text)
        named = field is not None and field[0] in values
        raise ValueError(f"--{name}.{text}" if named else str(error)) from None


def _take(words: Sequence[str], option: str) -> tuple[list[str], list[str]]:
    """The values that `option` has among the words, and the words without it."""
    values, rest = [], []
    left = iter(words)
    for word in left:
        if word == option and (value := next(left, None)) is not None:
            values.append(value)
        elif word.startswith(f"{option}="):
            values.append(word.removeprefix(f"{option}="))
        else:
            rest.append(word)
    return values, rest


def sections_of(recipe: AnyRecipe) -> dict[str, type]:
    """The parts of a recipe that have fields of their own, by name."""
    parts = ((field.name, getattr(recipe, field.name)) for field in fields(recipe))
    return {name: type(part) for name, part in parts if is_dataclass(part)}


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: no such file; a run leaves config.yaml in its folder")
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not YAML: {error}") from None
    if not isinstance(stored, dict):
        raise ValueError(f"--config {path} must hold sections (model, image, train), it holds {stored!r:.40}")
    return stored


def _flat(text: str) -> dict[str, Any]:
    """The fields of a configuration by the names of their options."""
    flat: dict[str, Any] = {}
    for name, value in yaml.safe_load(text).items():
        flat |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _check_names(path: str, stored: dict[str, Any], sections: dict[str, type]) -> None:
    """The names in a --config file, because jsonargparse would not say which file they are in."""
    for name, value in stored.items():
        if name not in (*sections, *_OPTIONS):
            raise ValueError(f"--config {path}: {name!r} is no field; there are {', '.join((*sections, *_OPTIONS))}")
        if name not in sections:
            continue
        known = [field.name for field in fields(sections[name])]
        if not isinstance(value, dict):
            raise ValueError(f"--config {path}: {name} must hold fields such as {known[0]}, it holds {value!r:.40}")
        for unknown in (key for key in value if key not in known):
            raise ValueError(f"--config {path}: '{name}.{unknown}' is no field; {name} has {', '.join(known)}")


def _last(stored: Sequence[tuple[str, dict[str, Any]]], name: str) -> Any:
    """What the files say of an option, the last that names it; None if no file does."""
    return next((values[name] for _, values in reversed(stored) if name in values), None)


def _stored_recipe(stored: Sequence[tuple[str, dict[str, Any]]]) -> str | None:
    if not stored:
        return None
    return next((str(values["recipe"]) for _, values in reversed(stored) if values.get("recipe")), _FIRST)


def _parser(name: str, recipe: AnyRecipe) -> ArgumentParser:
    lines = "\n".join(f"  {n:<24}{(make.__doc__ or '').splitlines()[0]}" for n, make in RECIPES.items())
    parser = ArgumentParser(
        prog="sola train",
        usage="sola train RECIPE --data FOLDER [--out FOLDER] [--config FILE] [--resume] [--SECTION.FIELD VALUE ...]",
        exit_on_error=False,
        allow_abbrev=False,
        description=f"Train a network by a recipe. The recipes:\n{lines}\n\nDefaults below are those of {name}.",
        formatter_class=_Help,
    )
    parser.add_argument("recipe", nargs="?", help="one of the recipes above")
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the fields below, such as a run's config.yaml"
    )
    parser.add_argument("--data", type=str, default="digits" if name == "digits" else None, help=recipe.data)
    parser.add_argument("--out", type=str, help="the run's folder (default: runs/RECIPE)")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in that folder with the settings of its config.yaml; fields given here change them and "
        "are saved there",
    )
    parser.add_argument(
        "--init", type=str, default=recipe.init, help="checkpoint whose weights the network starts from"
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON document on standard output")
    for section, kind in sections_of(recipe).items():
        parser.add_class_arguments(kind, section)
        defaults = asdict(getattr(recipe, section))
        parser.set_defaults({f"{section}.{field.name}": defaults[field.name] for field in fields(kind)})
    return parser


class _Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """The list of recipes as it is written, and every field's type and default."""


def _one_line(message: str, sections: dict[str, type]) -> str:
    """jsonargparse explains type errors in several lines; what a user needs is the option, the value and the type."""
    if (found := re.search(r'key "(\w+)":\s+Unable to load config (.*)', message)) and found[1] in sections:
        name, first = found[1], fields(sections[found[1]])[0].name
        return f"--{name} {found[2]}: {name} is a section of fields; give one of them, such as --{name}.{first} VALUE"
    key = re.search(r'Parser key "([^"]+)"', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if key is None or value is None:
        return f"{' '.join(message.split())}; `sola train RECIPE --help` lists what there is"
    kinds = re.search(r"Subtypes: \[(.*)\]", message) or re.search(r"Expected an? (.*?)\. Got", message)
    wanted = re.sub(r"<class '(\w+)'>", r"\1", kinds[1]).replace("NoneType", "null") if kinds else "another type"
    wanted = re.sub(r"typing\.Literal\[(.*?)\]", lambda found: found[1].replace("'", "").replace(", ", " or "), wanted)
    wanted = re.sub(r"tuple\[(\w+), \.\.\.\]", r"a list [\1, \1, ...]", wanted)
    return f"--{key[1]} {value[1]!r} does not fit: it takes {wanted.replace(', null', ' or null')}"
