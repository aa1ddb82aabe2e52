# SPDX-License-Identifier: Apache-2.0
"""A page that is open to this machine alone answers this machine's own page alone.

The browser that shows it shows other pages too. One of them may let its name point here after it was loaded (DNS
rebinding), and read what is answered; or send a picture here without reading anything. Both tell where they come from.
"""

from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

App = Callable[[Any, Any, Any], Awaitable[None]]


class OwnPage:
    """ASGI middleware: what `refusal` has a reason against is answered with that, and goes no further."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":  # the start and the end of the server
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        reason = refusal(headers.get("host", ""), headers.get("origin"))
        if reason is None:
            await self.app(scope, receive, send)
            return
        answer = "http.response" if scope["type"] == "http" else "websocket.http.response"
        await send({"type": f"{answer}.start", "status": 400, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": f"{answer}.body", "body": reason.encode()})


def refusal(host: str, origin: str | None) -> str | None:
    """Why a request with these headers is not the page's own; None if it is. Programs other than browsers send no
    origin.
    """
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        name = ""
    if not is_loopback(name):
        return f"{host!r} is not a name of this machine: the page is open to this machine alone, see sola app --host"
    if origin is not None and origin.partition("//")[2] != host:
        return f"a page of {origin} may not use this one"
    return None


def is_loopback(name: str) -> bool:
    """Whether only this machine is reached by the name, whatever a name server says."""
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
