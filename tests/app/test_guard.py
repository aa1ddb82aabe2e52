# SPDX-License-Identifier: Apache-2.0
"""Requests of the page itself are answered, others are rejected."""

import asyncio

import pytest

from sola_vision.app.guard import SameOriginOnly, is_loopback, rejection


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "[::1]:7860", "127.0.0.1", "127.8.9.1:80"])
def test_the_page_itself_and_programs_are_answered(host):
    assert rejection(host, None) is None
    assert rejection(host, f"http://{host}") is None


@pytest.mark.parametrize("host", ["evil.com", "evil.com:7860", "", "localhost.evil.com", "10.0.0.1:7860", "[", "[::2]"])
def test_other_names_of_this_machine_are_refused(host):
    assert "not a name of this machine" in rejection(host, f"http://{host}")


@pytest.mark.parametrize("origin", ["http://evil.com", "null", "", "http://127.0.0.1:8888", "http://localhost:7860"])
def test_other_pages_are_refused(origin):
    assert "are not allowed" in rejection("127.0.0.1:7860", origin)


def test_hosts_that_only_this_machine_reaches():
    assert all(map(is_loopback, ["127.0.0.1", "localhost", "::1"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.168.0.2", "example.org", ""]))


@pytest.mark.parametrize(
    ("kind", "headers", "answers"),
    [
        ("http", [(b"host", b"localhost:7860")], ["the app"]),
        ("lifespan", None, ["the app"]),
        ("http", [(b"host", b"evil.com")], ["http.response.start", "http.response.body"]),
        ("websocket", [], ["websocket.http.response.start", "websocket.http.response.body"]),
    ],
)
def test_what_is_refused_does_not_reach_the_app(kind, headers, answers):
    seen = []

    async def app(scope, receive, send):
        seen.append("the app")

    async def send(message):
        seen.append(message["type"])
        assert message.get("status", 400) == 400

    asyncio.run(SameOriginOnly(app)({"type": kind, "headers": headers}, None, send))
    assert seen == answers
