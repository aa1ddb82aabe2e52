# SPDX-License-Identifier: Apache-2.0
"""The command line, `sola VERB ...`. Each verb is a module of `commands` with a function `run(arguments)`.

Invalid input ends with one line on standard error and exit code 2, a training run that diverges with one line and exit
code 1; with SOLA_TRACEBACK=1 the exception is raised instead.
Standard output carries results only; with --json it is a single JSON document.
"""

import errno
import importlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

# verb -> description; the module of the same name (for `eval` it is `evaluate`) is imported when the verb is used
VERBS = {
    "train": "train a network from a recipe",
    "eval": "evaluate a checkpoint on labelled images",
    "predict": "run a checkpoint on an image or a folder of images",
    "explain": "show what each layer does with an image",
    "cost": "count parameters, multiply-adds and activation memory before training",
    "export": "export a network to ONNX, torch.export or AOTInductor",
    "app": "serve a local web page for trying images and editing schedules",
    "bench": "measure the speed and memory of the operator or of networks",
    "study": "run the experiments of the paper's tables and figures, and write their pages",
    "search": "search for the layers that should use softmax attention within a budget",
}
_MODULES = {"eval": "evaluate"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 1 if the run failed, 2 for invalid input, 130 if interrupted, 141 if
    nobody reads its results.
    """
    # as Python does for errors: a name that the output's encoding lacks (cp1252 in a pipe on Windows) is escaped
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader of the results has closed the pipe (`sola cost ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again at exit
        return 141


def _run(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] in ("-V", "--version"):
        from sola_vision.version import __version__

        print(f"sola-vision {__version__}")
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        from difflib import get_close_matches  # not sola_vision.suggest, because the package imports torch

        close = "".join(f" (did you mean {name}?)" for name in get_close_matches(verb, VERBS, n=1))
        return _fail(f"{verb!r} is not a command{close}; the commands are {', '.join(VERBS)}")
    if message := _unusable_argument(verb, arguments[1:]):
        return _fail(message)
    from sola_vision.engine import TrainingStopped, keep_heap
    from sola_vision.startup import uncollected

    keep_heap()
    with uncollected():
        command = importlib.import_module(f"sola_vision.commands.{_MODULES.get(verb, verb)}")
    try:
        return command.run(arguments[1:]) or 0
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # an OSError, but of standard output, not of a file that an option names
        raise
    except (ValueError, OSError, ImportError, TrainingStopped) as error:
        if os.environ.get("SOLA_TRACEBACK"):
            raise
        message = _describe(error, arguments[1:]) if isinstance(error, OSError) else str(error)
        return _fail(message, 1 if isinstance(error, TrainingStopped) else 2)
    except RuntimeError as error:
        if os.environ.get("SOLA_TRACEBACK") or not str(error).startswith("DataLoader worker"):
            raise
        return _fail(
            f"{error} (a process that reads images; was the memory full? use fewer workers or smaller images)", 1
        )


def _values(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (option, value) for every value on a command line; the option of a positional argument is ""."""
    option = ""
    for word in words:
        name, given, value = word.partition("=")
        if not word.startswith("--"):
            yield option, word
        elif given:
            yield name, value
        option = name if word.startswith("--") and not given else ""


def _unusable_argument(verb: str, words: Sequence[str]) -> str | None:
    """Return an error message if an argument is empty, as an unset shell variable is, or cannot be stored, else None.

    As a path, an empty argument would be the current folder.
    """
    for option, value in _values(words):
        # empty bridges are valid: a network without any
        if not value and not option.endswith("bridges"):
            return f"{option or 'an argument'} '' is empty: give a value, or set the shell variable used there"
        # libraries that write the files of a run refuse such paths, and a configuration that holds one is not readable
        if verb in ("train", "study", "search") and any("\ud800" <= letter <= "\udfff" for letter in value):
            return (
                f"{option or 'an argument'} {value!r} has bytes that are not {sys.getfilesystemencoding()}, which the "
                "files of a run cannot store: rename that file or folder (or set PYTHONUTF8=1 if its name is UTF-8)"
            )
    return None


def _describe(error: OSError, words: Sequence[str]) -> str:
    """Describe an OSError in one line: the option that names the file, the cause and the fix."""
    if error.errno == errno.ENOSPC and error.filename is None:  # from a write, which does not know its file
        return "no space left on the device that results are written to: make room, or use another --out"
    if error.errno is None or error.filename is None:
        return str(error)
    path = Path(os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename))
    near = [each for each in (path, *path.parents) if each != Path()]
    named = [(value, option) for option, value in _values(words) if option and Path(value) in near]
    value, option = max(named, key=lambda pair: len(Path(pair[0]).parts), default=(str(path), ""))
    place = f"{option} {value}".strip() + ("" if Path(value) == path else f": {path}")
    if error.strerror != os.strerror(error.errno):  # the message is already specific
        return f"{place}: {error.strerror}"
    blocking = next((each for each in near if os.path.exists(each) and not os.path.isdir(each)), None)
    if error.errno in (errno.EEXIST, errno.ENOTDIR) and blocking is not None:
        return f"{place}: {blocking} is a file, but must be a folder; use another path"
    if error.errno == errno.ENOENT and not os.path.isdir(path.absolute().parent):
        return f"{place}: its folder does not exist; create it first"
    if error.errno == errno.EISDIR:
        return f"{place}: this is a folder; give the path of a file"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{place}: {error.strerror.lower()}; change its permissions or use another path"
    return f"{place}: {error.strerror.lower()}"


def _fail(message: str, code: int = 2) -> int:
    # a message that starts with its command repeats the name of the program
    print(f"sola: {' '.join(message.split()).removeprefix('sola ')}", file=sys.stderr)
    return code


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {description}" for verb, description in VERBS.items())
    hint = "Run `sola COMMAND --help` for the options of a command. SOLA_TRACEBACK=1 shows the traceback of an error."
    return f"usage: sola COMMAND ...\n\n{verbs}\n\n{hint}"
