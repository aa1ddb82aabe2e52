# SPDX-License-Identifier: Apache-2.0
"""Claims: files that assign a run to one process, and from which others see whether that process is alive.

Claims are numbered. A process that sees that the owner of the last claim is dead creates the next; if two try at once,
only one succeeds, and nothing is ever renamed or removed. On the same machine an owner is alive while its process
exists. From elsewhere (another machine or container, after the folder was copied, or on Windows) it is alive while the
time in the file is recent; a thread of the owner renews it until a later claim exists.
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

_RENEW = 30.0  # seconds between updates of the time in a claim
_STALE = 600.0  # seconds without an update after which an owner elsewhere is considered dead


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Context manager: claim `folder`. Yields True if this process owns it now, False if another living one does."""
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
        with suppress(OSError):  # the results are stored; a claim that is not released only expires later
            _write(path, {**_myself(), "released": True})


def owner(folder: Path) -> str | None:
    """Return a description of the process that owns the folder, or None if no living process does."""
    last = _last(folder)
    return None if last is None or not _alive(last[1]) else f"process {last[1]['process']} on {last[1]['host']}"


def _take(folder: Path) -> Path | None:
    folder.mkdir(parents=True, exist_ok=True)
    last = _last(folder)
    if last is not None and _alive(last[1]):
        return None
    path = folder / f"claim.{0 if last is None else last[0] + 1}"
    # written before it gets its name, so that no process reads an incomplete claim
    temporary = folder / f".claim-{platform.node()}-{os.getpid()}-{time.time_ns()}"
    _write(temporary, _myself())
    try:
        os.link(temporary, path)
    except FileExistsError:
        return None
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        raise OSError(
            f"{folder}: its file system has no hard links, which claims of runs require; choose another --out"
        ) from None
    finally:
        temporary.unlink()
    return path


def _last(folder: Path) -> tuple[int, dict[str, Any]] | None:
    numbers = [int(path.name.removeprefix("claim.")) for path in folder.glob("claim.*") if path.suffix[1:].isdigit()]
    if not numbers:
        return None
    try:
        return max(numbers), json.loads((folder / f"claim.{max(numbers)}").read_text())
    except ValueError:
        # claims are written atomically; an invalid one comes from a damaged disk or copy
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
    """Return an identifier of this boot of the machine and of the container.

    Process numbers have no meaning after a reboot or in another container.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    names = [platform.node(), *([boot.read_text().strip()[:8]] if boot.exists() else [])]
    with suppress(OSError):  # exists only on Linux
        names.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(names)


def _started(process: int) -> str | None:
    """Return the start time of a process, in the system's unit, or None if it does not exist.

    With it a reused process number is told apart.
    """
    if os.name == "nt":  # signal 0 is Ctrl-C on Windows; the time in the file is used instead
        return None
    stat = Path(f"/proc/{process}/stat")
    if stat.parent.parent.joinpath("self").exists():
        try:
            # the name in brackets may contain anything; after it, field 1 is the state and field 20 the start time
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
        with suppress(OSError):  # a transient failure of the file system; the next update comes in time too
            if after.exists():  # this machine was suspended, and another process took over the run
                return
            _write(path, _myself())


def _write(path: Path, claim: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
    temporary.write_text(json.dumps(claim) + "\n")
    os.replace(temporary, path)
