# SPDX-License-Identifier: Apache-2.0
"""Imports point one way (ops -> layers -> backbone -> tasks), and files stay short."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "sola_vision"

# a room (subpackage or top-level module) imports itself and these rooms; None: any
IMPORTS = {
    "version": set(),
    "wording": set(),
    "fonts": set(),
    "colours": set(),
    "schedule": set(),
    "config": {"schedule", "wording"},
    "ops": set(),
    "layers": {"ops"},
    "backbone": {"config", "schedule", "layers"},
    "sola": {"config", "backbone", "layers"},
    "vrwkv_weights": set(),
    "vrwkv": {"backbone", "layers", "vrwkv_weights", "sola"},
    "data": {"wording"},
    "engine": {"wording"},
    "tasks": {
        *("config", "layers", "backbone", "vrwkv_weights", "vrwkv"),
        *("data", "engine", "wording", "fonts", "colours"),
    },
    "analysis": {"config", "schedule", "layers", "ops", "backbone", "sola", "fonts", "colours"},
    "bench": {"ops", "sola", "analysis", "tasks", "fonts"},
    "search": {"config", "schedule", "backbone", "data", "engine", "tasks", "analysis", "wording", "colours"},
    "export": {"ops"},
    "app": {"config", "schedule", "analysis", "data", "tasks"},
    "studies": {
        *("config", "schedule", "layers", "backbone", "data", "engine", "tasks", "analysis"),
        *("wording", "fonts", "colours"),
    },
    "startup": set(),
    "suggest": set(),
    "recipes": {"data", "engine", "suggest", "tasks"},
    "commands": None,
    "cli": {"engine", "startup", "version"},  # and, by their names, the commands
    "__init__": {"ops", "sola", "vrwkv", "backbone", "config", "schedule", "startup", "version", "tasks"},
    "__main__": {"cli"},
}
WITHOUT_TORCH = ("schedule", "config", "version")


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Absolute names of the modules (or attributes of modules) that a file imports, anywhere in it."""
    package = ("sola_vision", *path.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*parents, *filter(None, [node.module])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def test_imports_point_one_way():
    wrong, used = [], set()
    for path in PACKAGE.rglob("*.py"):
        here = room(path)
        for name in imports(path):
            parts = name.split(".")
            if IMPORTS[here] is None or parts[0] != "sola_vision" or parts[1] == here:  # every room is listed
                continue
            used.add((here, parts[1]))
            if parts[1] not in IMPORTS[here]:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert wrong == []
    # a permission that nothing needs would hide the first import that turns back
    assert used == {(here, other) for here, others in IMPORTS.items() for other in others or ()}


def test_the_mini_languages_do_not_need_torch():
    for name in WITHOUT_TORCH:
        assert not any(i.split(".")[0] in ("torch", "timm") for i in imports(PACKAGE / f"{name}.py"))


def test_files_can_be_read_in_one_sitting():
    long = {
        str(path.relative_to(PACKAGE)): lines
        for path in PACKAGE.rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > (700 if room(path) == "ops" else 400)
    }
    assert long == {}


def test_weights_are_never_unpickled_freely():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path


def test_the_page_of_files_has_a_row_for_every_file():
    root = PACKAGE.parent
    listed = []
    for folder, section in re.findall(
        r"^## `(\S+/)`\n(.*?)(?=^## |\Z)", (root / "docs/layout.md").read_text(), re.M | re.S
    ):
        listed += [folder + name for name in re.findall(r"^\| `([^`]+)` \|", section, re.M)]
    files = [*PACKAGE.rglob("*.py"), *(root / "csrc").iterdir(), *(root / "benchmarks").glob("*.py")]
    there = [path.relative_to(root).as_posix() for path in files if path.name != "__init__.py"]
    assert sorted(listed) == sorted(there)


def test_the_page_of_choices_names_every_file_that_has_one():
    page = (PACKAGE.parent / "docs/reconstruction.md").read_text().partition("## Left open")[2]
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| question |")]
    named = {file for row in rows for file in re.findall(r"`([^`]+\.py)`", row.split(" | ")[-1])}
    marked = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if "# not in the paper:" in path.read_text(encoding="utf-8")
    }
    assert named == marked
