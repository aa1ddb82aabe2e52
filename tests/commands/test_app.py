# SPDX-License-Identifier: Apache-2.0
"""`sola app` from the outside: one line for wrong input, before any page is there."""

import socket
import sys

import pytest


def test_port_in_use_is_one_line(refused):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        refused("app", "--port", port, names=[f"127.0.0.1:{port}", "in use", "--port"])


def test_missing_extra_is_named(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    refused("app", "--port", port, names=["gradio", "sola-vision[app]"])


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["nowhere"], ["nowhere", "no such checkpoint"]),
        (["--port", "0"], ["--port 0", "65535"]),
        (["--port", "many"], ["--port", "'many'"]),
        (["--host", "nowhere.invalid"], ["nowhere.invalid", "--host"]),
    ],
)
def test_wrong_request_is_one_line(refused, words, names):
    refused("app", *words, names=names)


def test_a_pickle_is_refused(refused, tmp_path):
    (tmp_path / "theirs.pth").write_bytes(b"\x80\x04N.")
    refused("app", "theirs.pth", names=["theirs.pth"])
