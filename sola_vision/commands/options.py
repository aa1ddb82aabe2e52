# SPDX-License-Identifier: Apache-2.0
"""Options of a run: every field of a recipe as `--section.field`, from a YAML file, the command line or both.

In increasing priority: the recipe, with --resume the run's own config.yaml, `--config FILE`, the command line. Unknown
fields and wrong types are errors of one line.
"""

import argparse
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter

from sola_vision.engine.checkpoint import STATE
from sola_vision.recipes import RECIPES, AnyRecipe, get_recipe
from sola_vision.suggest import suggestion

_OPTIONS = ("recipe", "data", "init", "out", "resume", "json")
_TUPLES = {
    "tuple[float, float]": "two numbers, such as [0.5,1.0]",
    "tuple[float, float, float]": "three numbers, such as [0.5,0.5,0.5]",
}
_DEFAULT_RECIPE = next(iter(RECIPES))  # its defaults apply if no recipe is named


@dataclass(kw_only=True)
class Run:
    """The parsed command line of `sola train`."""

    recipe: str
    configuration: AnyRecipe
    data: str
    out: Path
    resume: bool
    json: bool

    @property
    def start(self) -> str | None:
        """The checkpoint to initialise the weights from; None if a resumed run has already saved a state."""
        return None if self.resume and (self.out / STATE).exists() else self.configuration.init

    @property
    def text(self) -> str:
        """The whole configuration as YAML, which reproduces the run, except the output folder."""
        values = {"recipe": self.recipe, "data": self.data, **asdict(self.configuration)}
        return yaml.safe_dump(values, sort_keys=False)

    def changes(self, before: str) -> list[str]:
        """Describe the fields that differ from an earlier `text`, except `train.*`, which the engine reports."""
        then = _flatten(before)
        now = {name: value for name, value in _flatten(self.text).items() if not name.startswith("train.")}
        return [f"{k}={v} (was {then[k]})" for k, v in now.items() if k in then and v != then[k]]


def parse_run(arguments: Sequence[str]) -> Run:
    """Parse the command line of `sola train`. Prints and exits for --help and --print_config."""
    words = list(arguments)
    named = words.pop(0) if words and not words[0].startswith("-") else None
    files, words = _extract_option(words, "--config")
    stored = [(file, _read_yaml(Path(file))) for file in files]
    recipe = named or _stored_recipe(stored)
    if "--resume" in words or _last_value(stored, "resume"):
        folder = (_extract_option(words, "--out")[0] or [_last_value(stored, "out") or f"runs/{recipe}"])[-1]
        # a run resumes with its own settings, even if the recipe has changed since
        if (kept := Path(folder) / "config.yaml").is_file():
            stored.insert(0, (str(kept), _read_yaml(kept)))
            recipe = named or _stored_recipe(stored)
    if recipe is None:
        if not any(word in ("-h", "--help") or word.startswith("--print_config") for word in words):
            raise ValueError(
                f"sola train needs a recipe as its first argument: {', '.join(RECIPES)}; or --config FILE of "
                "an earlier run"
            )
        recipe = _DEFAULT_RECIPE
    base = get_recipe(recipe)
    sections = sections_of(base)
    for file, content in stored:
        _check_field_names(file, content, sections)
    parser = _parser(recipe, base)
    try:
        # files first, so that the command line overrides them wherever --config appears in it
        values = parser.parse_args([recipe, *(f"--config={file}" for file, _ in stored), *words])
    except argparse.ArgumentError as error:
        raise ValueError(_one_line(str(error), sections)) from None
    if values.data is None:
        raise ValueError(f"sola train {recipe} needs --data: {base.data}")
    parts = {
        name: {field.name: getattr(values[name], field.name) for field in fields(kind)}
        for name, kind in sections.items()
    }
    built = {name: _build_section(name, sections[name], part) for name, part in parts.items()}
    configuration = type(base)(**built, init=values.init)
    _refuse_pretrained(configuration.model.name)
    out = Path(values.out) if values.out else Path("runs") / recipe
    return Run(
        recipe=recipe,
        configuration=configuration,
        data=values.data,
        out=out,
        resume=values.resume,
        json=values.json,
    )


def _refuse_pretrained(name: str) -> None:
    """Raise ValueError for a timm name with the tag of pretrained weights, from which training would not start."""
    network, _, tag = name.partition(".")
    if tag:
        raise ValueError(
            f"--model.name {name}: {tag!r} names pretrained weights, and training downloads none: use "
            f"--model.name {network} for random weights, with --init FILE for weights of your own"
        )


def _build_section(name: str, kind: type, values: dict[str, Any]) -> Any:
    with option_errors(name, values):
        return kind(**values)


@contextmanager
def option_errors(section: str, names: Collection[str]) -> Iterator[None]:
    """Replace the name of a field at the beginning of a ValueError by its option on the command line."""
    try:
        yield
    except ValueError as error:
        text = str(error).removeprefix(f"{section}.")
        field = re.match(r"\w*", text)
        named = field is not None and field[0] in names
        raise ValueError(f"--{section}.{text}" if named else str(error)) from None


def _extract_option(words: Sequence[str], option: str) -> tuple[list[str], list[str]]:
    """Return the values of `option` on a command line, and the remaining words."""
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
    """Return the sections of a recipe, which are dataclasses, as name -> type."""
    parts = ((field.name, getattr(recipe, field.name)) for field in fields(recipe))
    return {name: type(part) for name, part in parts if is_dataclass(part)}


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: no such file; a run writes config.yaml to its folder")
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not YAML: {error}") from None
    if not isinstance(stored, dict):
        raise ValueError(f"--config {path} must contain sections (model, image, train), got {stored!r:.40}")
    return stored


def _flatten(text: str) -> dict[str, Any]:
    """Return the fields of a configuration by the names of their options."""
    flat: dict[str, Any] = {}
    for name, value in yaml.safe_load(text).items():
        flat |= {f"{name}.{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _check_field_names(path: str, stored: dict[str, Any], sections: dict[str, type]) -> None:
    """Raise ValueError for unknown names in a --config file; jsonargparse's errors do not name the file."""
    for name, value in stored.items():
        if name not in (*sections, *_OPTIONS):
            raise ValueError(
                f"--config {path}: unknown field {name!r}; choose from {', '.join((*sections, *_OPTIONS))}"
            )
        if name not in sections:
            continue
        known = [field.name for field in fields(sections[name])]
        if not isinstance(value, dict):
            raise ValueError(f"--config {path}: {name} must contain fields such as {known[0]}, got {value!r:.40}")
        for unknown in (key for key in value if key not in known):
            raise ValueError(f"--config {path}: unknown field '{name}.{unknown}'; {name} has {', '.join(known)}")


def _last_value(stored: Sequence[tuple[str, dict[str, Any]]], name: str) -> Any:
    """Return the value of an option in the last file that sets it, or None."""
    return next((values[name] for _, values in reversed(stored) if name in values), None)


def _stored_recipe(stored: Sequence[tuple[str, dict[str, Any]]]) -> str | None:
    if not stored:
        return None
    return next((str(values["recipe"]) for _, values in reversed(stored) if values.get("recipe")), _DEFAULT_RECIPE)


def _parser(name: str, recipe: AnyRecipe) -> ArgumentParser:
    lines = "\n".join(f"  {n:<24}{(make.__doc__ or '').splitlines()[0]}" for n, make in RECIPES.items())
    parser = ArgumentParser(
        prog="sola train",
        usage="sola train RECIPE --data FOLDER [--out FOLDER] [--config FILE] [--resume] [--SECTION.FIELD VALUE ...]",
        exit_on_error=False,
        allow_abbrev=False,
        description=f"Train a network from a recipe. The recipes:\n{lines}\n\nDefaults below are those of {name}.",
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
    parser.add_argument("--init", type=str, default=recipe.init, help="checkpoint to initialise the weights from")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON document on standard output")
    for section, kind in sections_of(recipe).items():
        parser.add_class_arguments(kind, section)
        defaults = asdict(getattr(recipe, section))
        parser.set_defaults({f"{section}.{field.name}": defaults[field.name] for field in fields(kind)})
    return parser


class _Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of the list of recipes, and shows every field's type and default."""


def _one_line(message: str, sections: dict[str, type]) -> str:
    """Shorten jsonargparse's type error of several lines to the option, the value and the expected type."""
    if (found := re.search(r'key "(\w+)":\s+Unable to load config (.*)', message)) and found[1] in sections:
        name, first = found[1], fields(sections[found[1]])[0].name
        return f"--{name} {found[2]}: {name} is a section of fields; set one of them, such as --{name}.{first} VALUE"
    key = re.search(r'Parser key "([^"]+)"', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    if key is None or value is None:
        text = " ".join(message.split())
        if unknown := re.search(r"unrecognized arguments: (--[^\s=]+)", text):
            known = [f"--{name}.{field.name}" for name, kind in sections.items() for field in fields(kind)]
            text += suggestion(unknown[1], [*known, "--config", *(f"--{name}" for name in _OPTIONS[1:])])
        return f"{text}; see `sola train RECIPE --help`"
    kinds = re.search(r"Subtypes: \[(.*)\]", message) or re.search(r"Expected an? (.*?)\. Got", message)
    expected = re.sub(r"<class '(\w+)'>", r"\1", kinds[1]).replace("NoneType", "null") if kinds else "another type"
    expected = re.sub(
        r"typing\.Literal\[(.*?)\]", lambda found: found[1].replace("'", "").replace(", ", " or "), expected
    )
    expected = re.sub(r"tuple\[(\w+), \.\.\.\]", r"a list [\1, \1, ...]", expected)
    expected = expected.replace(", null", " or null")
    section, _, name = key[1].partition(".")
    types = {field.name: str(field.type) for field in fields(sections[section])} if section in sections else {}
    for written, example in _TUPLES.items():
        if written in types.get(name, ""):
            expected = example + (", or null" if "None" in types[name] else "")
    return f"--{key[1]} {value[1]!r} is invalid: expected {expected}"
