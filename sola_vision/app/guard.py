# SPDX-License-Identifier: Apache-2.0
"""Rejection of requests that do not come from the page itself, for a page that only this machine can reach.

The browser that shows the page shows other websites too. One of them could let its name resolve to this machine after
it was loaded (DNS rebinding) and read the answers, or send an image without reading the answer. The headers of both
reveal their origin.
"""

from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

App = Callable[[Any, Any, Any], Awaitable[None]]


class SameOriginOnly:
    """ASGI middleware that answers a request with status 400 and the reason if `rejection` returns one."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":  # the start and the end of the server
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        reason = rejection(headers.get("host", ""), headers.get("origin"))
        if reason is None:
            await self.app(scope, receive, send)
            return
        answer = "http.response" if scope["type"] == "http" else "websocket.http.response"
        await send({"type": f"{answer}.start", "status": 400, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": f"{answer}.body", "body": reason.encode()})


def rejection(host: str, origin: str | None) -> str | None:
    """Return why a request with these headers is not the page's own, or None if it is.

    Programs other than browsers send no origin.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        name = ""
    if not is_loopback(name):
        return f"{host!r} is not a name of this machine: only this machine can reach the page, see sola app --host"
    if origin is not None and origin.partition("//")[2] != host:
        return f"requests from pages of {origin} are not allowed"
    return None


def is_loopback(name: str) -> bool:
    """True if the name always refers to this machine, whatever a name server returns."""
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
