# SPDX-License-Identifier: Apache-2.0
"""Which process does a run: a claim is a file that only one can create, and the file says whether its owner lives.

A claim has a number. Whoever finds the last one's owner dead creates the next; of two that find it at once one
succeeds, and nothing is ever renamed or removed. On one machine an owner lives while its process does; from another (or
another container, after a copy of the folder, or on Windows) while the time in the file is fresh, which a thread of the
owner renews until somebody has taken the next claim.
"""

import errno
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_RENEW = 30.0  # seconds between signs of life
_STALE = 600.0  # seconds after which an owner elsewhere counts as dead


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """True within the block if this process now owns `folder`, False if a living one does."""
    path = _take(folder)
    if path is None:
        yield False
        return
    done = threading.Event()
    thread = threading.Thread(target=_stay_alive, args=(path, done), daemon=True)
    thread.start()
    try:
        yield True
    finally:
        done.set()
        thread.join()
        with suppress(OSError):  # what was done is there, and nobody needs the claim of a process that ends
            _write(path, {**_myself(), "released": True})


def owner(folder: Path) -> str | None:
    """Who has the folder now, for people; None if nobody living."""
    last = _last(folder)
    return None if last is None or not _alive(last[1]) else f"process {last[1]['process']} on {last[1]['host']}"


def _take(folder: Path) -> Path | None:
    folder.mkdir(parents=True, exist_ok=True)
    last = _last(folder)
    if last is not None and _alive(last[1]):
        return None
    path = folder / f"claim.{0 if last is None else last[0] + 1}"
    # complete before it has its name, so that nobody ever reads half a claim
    mine = folder / f".claim-{platform.node()}-{os.getpid()}-{time.time_ns()}"
    _write(mine, _myself())
    try:
        os.link(mine, path)
    except FileExistsError:
        return None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        raise OSError(
            f"{folder}: its file system has no hard links, which tell processes whose a run is; choose another --out"
        ) from None
    finally:
        mine.unlink()
    return path


def _last(folder: Path) -> tuple[int, dict[str, Any]] | None:
    numbers = [int(path.name.removeprefix("claim.")) for path in folder.glob("claim.*") if path.suffix[1:].isdigit()]
    if not numbers:
        return None
    try:
        return max(numbers), json.loads((folder / f"claim.{max(numbers)}").read_text())
    except ValueError:
        # written in full by whoever took it; only a broken disk or copy leaves less
        return max(numbers), {"released": True}


def _alive(claim: dict[str, Any]) -> bool:
    if claim.get("released"):
        return False
    if claim["host"] == _host() and os.name != "nt":
        return _started(claim["process"]) == claim["started"]
    return time.time() - claim["seen"] < _STALE


def _myself() -> dict[str, Any]:
    return {"host": _host(), "process": os.getpid(), "started": _started(os.getpid()), "seen": time.time()}


def _host() -> str:
    """The machine since it was switched on, since after a restart no process of before is alive; and the container,
    since in another one a number is another process.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    names = [platform.node(), *([boot.read_text().strip()[:8]] if boot.exists() else [])]
    with suppress(OSError):  # Linux alone has it
        names.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(names)


def _started(process: int) -> str | None:
    """When a process began, in the system's own unit; None if there is none: numbers of processes come again."""
    if os.name == "nt":  # there signal 0 is Ctrl-C; the time in the file has to do
        return None
    stat = Path(f"/proc/{process}/stat")
    if stat.parent.parent.joinpath("self").exists():
        try:
            # the name in brackets may hold anything; state is the first field behind it, the start the twentieth
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "running"


def _stay_alive(path: Path, done: threading.Event) -> None:
    after = path.with_suffix(f".{int(path.suffix[1:]) + 1}")
    while not done.wait(_RENEW):
        with suppress(OSError):  # a file system may fail for a moment, and the next sign comes in time too
            if after.exists():  # this machine slept, and another has taken the run for left
                return
            _write(path, _myself())


def _write(path: Path, claim: dict[str, Any]) -> None:
    beside = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
    beside.write_text(json.dumps(claim) + "\n")
    os.replace(beside, path)
