# SPDX-License-Identifier: Apache-2.0
"""`sola app [CHECKPOINT ...]`: a local page that shows what every layer does with an image, and edits schedules.

It offers the given checkpoints, those in runs/ of the current folder, and the sola_* networks with random weights. The
page is reachable from this machine only, unless --host is given, and loads nothing from the internet.
"""

import os
import socket
from argparse import Namespace
from collections.abc import Sequence

from sola_vision.commands.arguments import Arguments
from sola_vision.tasks import read_description


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    options = _parse(arguments)
    for source in options.checkpoints:
        read_description(source)  # report an unreadable checkpoint before the page starts
    _check_port(options.host, options.port)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
        from starlette.middleware import Middleware
    except ImportError as error:
        raise ImportError(f"sola app needs gradio: pip install 'sola-vision[app]' ({error})") from None
    from sola_vision.app.guard import SameOriginOnly, is_loopback
    from sola_vision.app.page import CSS, build

    guards = [Middleware(SameOriginOnly)] if is_loopback(options.host) else []
    page = build(options.checkpoints)
    print(f"http://{options.host}:{options.port} (Ctrl-C stops it)", flush=True)
    page.launch(
        server_name=options.host,
        server_port=options.port,
        inbrowser=options.open,
        share=False,
        quiet=True,
        max_file_size="64mb",
        app_kwargs={"middleware": guards},
        css=CSS,
        theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    )


def _parse(arguments: Sequence[str]) -> Namespace:
    parser = Arguments("sola app", __doc__)
    parser.add_argument(
        "checkpoints", nargs="*", metavar="CHECKPOINT", help="best.safetensors files or folders of runs"
    )
    parser.add_argument("--port", type=int, default=7860, help="port of the page")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve on; 0.0.0.0 makes the page reachable from the network"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    options = parser.parse_args(list(arguments))
    if not 0 < options.port < 65536:
        raise ValueError(f"--port {options.port} must be between 1 and 65535")
    return options


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # a server that has just ended keeps its port for a minute; on Windows the option would free a running one's
        if os.name == "posix":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            reason = str(error.strerror).lower()
            raise OSError(f"{host}:{port}: {reason}; choose another --port, or a --host of this machine") from None
