# SPDX-License-Identifier: Apache-2.0
"""Every command and every snippet of the README and of docs/ runs, page by page from the first to the last.

Commands of ours run in this process, on the small files of `world.py`. What is made shorter, or only read by its command
line, stands in `shortened.py` with its reason. What is none of that fails.
"""

import argparse
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import world
from pages import PAGES, ROOT, SHELL, blocks
from shortened import COMPILED, ELSEWHERE, PARSED, REPLACED, SHORTER

from sola_vision.cli import main
from sola_vision.commands.options import parse_run


class Parsed(BaseException):
    """A command line was read to its end."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("world")
    world.write(root)
    world.train(root)
    yield root
    torch.set_num_threads(threads)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_the_page_runs(page, prepared, tmp_path, monkeypatch):
    here = tmp_path / "here"
    shutil.copytree(prepared, here, symlinks=True)
    monkeypatch.chdir(here)
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.language == "python":
            run_python(block, names)
        elif block.language in SHELL:
            for command in block.commands():
                run_command(command, block.place, monkeypatch)
        else:
            pytest.fail(
                f"{block.place}: nobody runs a block in {block.language!r}; leave the language out if it is no code"
            )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_block_that_names_our_networks_imports_them(page):
    """Blocks are copied one by one, and run above in the names of those before them."""
    for block in blocks(page):
        if block.language == "python" and re.search(r'"(tu-)?sola_\w+"', block.text):
            assert re.search(r"^(import|from) .*sola_vision", block.text, re.M), block.place


def found_in(table, command):
    return next((row for row in table if re.search(row[0], command)), None)


def run_python(block, names):
    text = block.text
    for old, new, _ in REPLACED:
        text = text.replace(old, new)
    code = compile(text, block.place, "exec")
    if found_in(COMPILED, block.text):
        return
    try:
        exec(code, names)
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("sola_vision"):
            raise
        pytest.skip(f"{block.place} needs {error.name}")


def run_command(command, place, monkeypatch):
    if found_in(ELSEWHERE, command):
        return
    only_parsed = found_in(PARSED, command) is not None
    for one in loop(command):
        words = shlex.split(one.split("<<")[0], comments=True)
        if words[0] == "torchrun":
            # one process computes what several do
            words = ["sola", *words[words.index("sola_vision") + 1 :]]
        if words[0] == "sola" or words[:3] == ["python", "-m", "sola_vision"]:
            run_sola(words[1:] if words[0] == "sola" else words[3:], only_parsed, place, monkeypatch)
        elif words[0] == "python":
            run_script(words[1:], one, only_parsed, monkeypatch)
        elif words[:2] == ["pip", "install"]:
            check_extras(words[2:], place)
        elif words[0] == "make":
            subprocess.run(["make", "--dry-run", "-C", ROOT, *words[1:]], check=True, capture_output=True)
        else:
            pytest.fail(f"{place}: nobody runs {one!r}")


def loop(command):
    """The command, or what a shell loop over words repeats."""
    turns = re.fullmatch(r"for (\w+) in ([^;]*); do (.*?) & done", command.strip())
    if not turns:
        return [command]
    return [turns[3].replace(f"${turns[1]}", word) for word in turns[2].split()]


def run_sola(words, only_parsed, place, monkeypatch):
    point_folder(words)
    if only_parsed:
        parse(words, monkeypatch)
        return
    told = "sola " + shlex.join(words)
    if row := found_in(SHORTER, told):
        words = [*words, *row[1].split()]
    if words[0] == "train" and "--resume" not in words and "--print_config" not in words:
        # the trainings of a page are alternatives, and a folder holds one run
        out = words[words.index("--out") + 1] if "--out" in words else f"runs/{words[1]}"
        shutil.rmtree(out, ignore_errors=True)
    try:
        code = main(words)
    except SystemExit as end:
        code = end.code
    assert not code, f"{place}: {told} ended with {code}"


def point_folder(words):
    """FOLDER is one of three, as the command's task wants it."""
    told = " ".join(words)
    kind = "OBJECTS" if "few_objects" in told else "MASKS" if "few_masks" in told else "IMAGES"
    Path("FOLDER").unlink(missing_ok=True)
    Path("FOLDER").symlink_to(kind)


def parse(words, monkeypatch):
    """Reads a command with its real command line; nothing is done."""
    if words[0] == "train":
        parse_run(words[1:])
        return
    with monkeypatch.context() as patched:
        stop_after_parsing(patched)
        with pytest.raises(Parsed):
            main(words)


def stop_after_parsing(patched):
    original = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        original(self, *args, **kwargs)
        raise Parsed

    patched.setattr(argparse.ArgumentParser, "parse_args", parse_args)


def run_script(words, command, only_parsed, monkeypatch):
    if words[0] == "-c":
        exec(compile(words[1], "-c", "exec"), {})
        return
    if words[0] == "-":
        exec(compile("\n".join(command.splitlines()[1:-1]), "-", "exec"), {})
        return
    file = Path(words[0]) if Path(words[0]).exists() else ROOT / words[0]
    assert file.is_file(), f"{command}: there is no {words[0]}"
    with monkeypatch.context() as patched:
        patched.setattr(sys, "argv", [str(file), *words[1:]])
        patched.syspath_prepend(file.resolve().parent)
        if not only_parsed:
            runpy.run_path(str(file), run_name="__main__")
        elif "argparse" in file.read_text():
            stop_after_parsing(patched)
            with pytest.raises(Parsed):
                runpy.run_path(str(file), run_name="__main__")


def check_extras(words, place):
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if extras := re.search(r"\[(.*)\]", word):
            assert set(extras[1].split(",")) <= set(known), f"{place}: {word} has an unknown extra"
