# SPDX-License-Identifier: Apache-2.0
"""The command line: `sola VERB ...`. A verb is a module of `commands` with `add_arguments` and `run`.

What a user can get wrong ends in one line on standard error and exit code 2; SOLA_TRACEBACK=1 shows where it came from.
Standard output carries results only, and with --json one JSON document and nothing else.
"""

import importlib
import os
import sys
from collections.abc import Sequence

# verb -> what it does; the module of the same name (`eval` lives in `evaluate`) is imported when the verb is used
VERBS = {
    "train": "train a network by a recipe",
    "eval": "evaluate a checkpoint on labelled images",
    "predict": "say what is in an image or in a folder of images",
    "explain": "show what each layer does with an image",
    "cost": "count parameters, multiply-adds and activation memory before training",
    "export": "write a network as a file for other programs: ONNX, torch.export, AOTInductor",
    "app": "open a local page to drop pictures on and to edit schedules",
    "bench": "measure the speed and memory of the operator or of networks",
    "study": "run the paper's tables and figures, and write their pages",
    "search": "find which layers should be softmax under a budget",
}
_MODULES = {"eval": "evaluate"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 1 if the run itself failed, 2 for wrong input, 130 if interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] in ("-V", "--version"):
        from sola_vision.version import __version__

        print(f"sola-vision {__version__}")
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        return _refuse(f"{verb!r} is not a command; the commands are {', '.join(VERBS)}")
    from sola_vision.engine import keep_heap
    from sola_vision.startup import uncollected

    keep_heap()
    with uncollected():
        command = importlib.import_module(f"sola_vision.commands.{_MODULES.get(verb, verb)}")
    try:
        return command.run(arguments[1:]) or 0
    except KeyboardInterrupt:
        return 130
    except _input_errors() as error:
        if os.environ.get("SOLA_TRACEBACK"):
            raise
        return _refuse(str(error))


def _input_errors() -> tuple[type[BaseException], ...]:
    from sola_vision.engine import TrainingStopped

    return (ValueError, OSError, ImportError, TrainingStopped)


def _refuse(message: str) -> int:
    print(f"sola: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    more = "`sola COMMAND --help` says more. SOLA_TRACEBACK=1 shows where an error comes from."
    return f"usage: sola COMMAND ...\n\n{verbs}\n\n{more}"
