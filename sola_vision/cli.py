# SPDX-License-Identifier: Apache-2.0
"""The command line: `sola VERB ...`. A verb is a module of `commands` with `add_arguments` and `run`.

What a user can get wrong ends in one line on standard error and exit code 2, a training that diverges in one and exit
code 1; SOLA_TRACEBACK=1 shows where it came from.
Standard output carries results only, and with --json one JSON document and nothing else.
"""

import errno
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

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
    if empty := _empty(arguments[1:]):
        return _refuse(empty)
    from sola_vision.engine import TrainingStopped, keep_heap
    from sola_vision.startup import uncollected

    keep_heap()
    with uncollected():
        command = importlib.import_module(f"sola_vision.commands.{_MODULES.get(verb, verb)}")
    try:
        code = command.run(arguments[1:]) or 0
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the results has seen enough (`sola cost ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more at its end
        return 141
    except (ValueError, OSError, ImportError, TrainingStopped) as error:
        if os.environ.get("SOLA_TRACEBACK"):
            raise
        message = _plain(error, arguments[1:]) if isinstance(error, OSError) else str(error)
        return _refuse(message, 1 if isinstance(error, TrainingStopped) else 2)


def _values(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(option, value) of every value on a command line; "" is the option of one that stands alone."""
    option = ""
    for word in words:
        name, given, value = word.partition("=")
        if not word.startswith("--"):
            yield option, word
        elif given:
            yield name, value
        option = name if word.startswith("--") and not given else ""


def _empty(words: Sequence[str]) -> str | None:
    """What an unset variable of the shell leaves; as a path it would be the current folder."""
    for option, value in _values(words):
        if not value and not option.endswith("bridges"):  # no bridges are a network too
            return f"{option or 'an argument'} '' is empty: give a value, or set the shell variable that stands there"
    return None


def _plain(error: OSError, words: Sequence[str]) -> str:
    """What the system refused to do with a file: the option that names the file, what is wrong and what to do."""
    if error.errno is None or error.filename is None:
        return str(error)
    path = Path(os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename))
    near = [each for each in (path, *path.parents) if each != Path()]
    named = [(value, option) for option, value in _values(words) if option and Path(value) in near]
    value, option = max(named, key=lambda pair: len(Path(pair[0]).parts), default=(str(path), ""))
    place = f"{option} {value}".strip() + ("" if Path(value) == path else f": {path}")
    if error.strerror != os.strerror(error.errno):  # somebody has said more already
        return f"{place}: {error.strerror}"
    blocking = next((each for each in near if os.path.exists(each) and not os.path.isdir(each)), None)
    if error.errno in (errno.EEXIST, errno.ENOTDIR) and blocking is not None:
        return f"{place}: {blocking} is a file, and a folder has to be there; name another"
    if error.errno == errno.ENOENT and not os.path.isdir(path.absolute().parent):
        return f"{place}: its folder does not exist; create it first"
    if error.errno == errno.EISDIR:
        return f"{place}: it is a folder; name a file"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{place}: {error.strerror.lower()}; change its permissions or name another"
    return f"{place}: {error.strerror.lower()}"


def _refuse(message: str, code: int = 2) -> int:
    # a message that names its command begins with the program, which is said already
    print(f"sola: {' '.join(message.split()).removeprefix('sola ')}", file=sys.stderr)
    return code


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {what}" for verb, what in VERBS.items())
    more = "`sola COMMAND --help` says more. SOLA_TRACEBACK=1 shows where an error comes from."
    return f"usage: sola COMMAND ...\n\n{verbs}\n\n{more}"
