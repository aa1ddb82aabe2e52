# SPDX-License-Identifier: Apache-2.0
"""Fixtures: a tiny data set, a tiny trained network, and `sola`, which runs a command in this process."""

from dataclasses import dataclass

import pytest
import torch
from small import TINY, write_images

from sola_vision.cli import main


@dataclass
class Said:
    """The exit code and the output of a command."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="package", autouse=True)
def _as_many_threads_as_the_processes():
    # runs are compared bit by bit with runs in processes of one thread; other thread numbers sum in another order
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def sola(capsys):
    def call(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        return Said(code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(sola, tmp_path):
    """Runs a command that must fail: one line with all `names`, exit code 2, no output, and no file changed."""

    def call(*words, names):
        before = _files(tmp_path)
        said = sola(*words)
        assert (said.code, said.out) == (2, ""), said
        assert said.err.count("\n") == 1, said.err
        assert said.err.endswith("\n")
        assert said.err.startswith("sola: ")
        for name in names:
            assert str(name) in said.err
        assert _files(tmp_path) == before
        return said.err

    return call


def _files(root):
    return {path: path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="package")  # as the number of its threads; a session's fixture would come before
def trained(tmp_path_factory, data):
    """The folder of a finished run; tests must not write there, and an error after the last of them says if one did."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    assert main([*TINY, "--data", str(data), "--out", str(folder)]) == 0
    before = _files(folder)
    yield folder
    # a test that lists the folder would otherwise depend on the tests before it
    assert {path for path, _ in before.items() ^ _files(folder).items()} == set(), "a test wrote into this folder"
