# SPDX-License-Identifier: Apache-2.0
"""Logging of a run: metrics.jsonl, TensorBoard, progress on standard error, and the final summary.

Only the first process writes. Standard output is reserved for results.
"""

import errno
import json
import logging
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from ..wording import amount
from .config import Task

METRICS = Path("metrics.jsonl")
SUMMARY = Path("summary.json")

_LOCKED = "another process is training there: wait until it ends or choose another folder (--out)"

_log = logging.getLogger("sola_vision")


class Log:
    """The log of a run. `keep` is the length of metrics.jsonl at the resumed state; the rest is cut off."""

    def __init__(self, folder: Path, *, main: bool, total: int, step: int = 0, keep: int = 0) -> None:
        self.main = main
        self.total = total
        if not main:
            return
        # slow to import, and used only in training
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / METRICS).open("ab")
        if not _lock(self._file):
            raise ValueError(f"{folder}: {_LOCKED}")
        self._file.truncate(min(keep, self._file.tell()))
        # hide later events in the folder, from a killed run or from one that failed at its start
        self._board = SummaryWriter(str(folder), purge_step=step + 1)
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=10),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                TextColumn("left"),
            )
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task("training", total=total, completed=step, numbers="")

    def info(self, text: str) -> None:
        """Print one line to standard error."""
        if self.main:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def record(self, kind: str, step: int, epoch: float, numbers: Mapping[str, float]) -> None:
        """Append one line to metrics.jsonl and the same numbers to TensorBoard; nan, unknown to JSON, becomes null."""
        if not self.main:
            return
        line = {"kind": kind, "step": step, "epoch": round(epoch, 4), **_plain(numbers)}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        for name, value in numbers.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def progress(self, step: int, epoch: float, numbers: Mapping[str, float] | None = None, left: float = 0) -> None:
        """Update the progress bar; without a terminal, print one line if `numbers` are given."""
        if not self.main:
            return
        text = "" if numbers is None else "  ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        if self._bar is not None:
            fields: dict[str, Any] = {} if numbers is None else {"numbers": text}
            self._bar.update(self._task, completed=step, description=f"epoch {epoch:.1f}", **fields)
        elif numbers is not None:
            self.info(f"epoch {epoch:.2f}  step {step}/{self.total}  {text}  {_duration(left)} left")

    def position(self) -> int:
        """Flush metrics.jsonl to disk and return its length in bytes."""
        if not self.main:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Stop the progress bar and close the files."""
        if self.main:
            if self._bar is not None:
                self._bar.stop()
            self._board.close()
            self._file.close()


def metric_texts(task: Task, numbers: Mapping[str, float], spec: str) -> dict[str, str]:
    """Return the metrics to print, such as "top1 71.25 %", by name: those of `task.printed`, or all without units."""
    units: Mapping[str, str] = getattr(task, "printed", dict.fromkeys(numbers, ""))
    return {name: f"{name} {numbers[name]:{spec}} {unit}".rstrip() for name, unit in units.items() if name in numbers}


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def check_unlocked(folder: Path) -> None:
    """Raise ValueError if another process of this machine is writing the metrics of a run in `folder`."""
    path = folder / METRICS
    if path.is_file():
        with path.open("rb") as file:
            if not _lock(file, shared=True):  # all processes of a run may check at once
                raise ValueError(f"{folder}: {_LOCKED}")


def _lock(file: IO[bytes], shared: bool = False) -> bool:
    """Lock the file; False if another process holds a lock. It ends with the process; workers do not inherit it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # a file system may not support locks
    return True


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics.jsonl. A damaged line is skipped with a warning, so the rest stays readable."""
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and {"kind", "step", "epoch"} <= record.keys():
            records.append(record)
        else:
            _log.warning("%s: line %d is not a record and is skipped", path, number)
    return records


def write_json(path: Path, document: Any) -> None:
    """Write a document as JSON (`json_text`), atomically (`write_text`)."""
    write_text(path, json_text(document) + "\n")


def json_text(document: Any) -> str:
    """Return a document as indented JSON. nan and inf, which JSON cannot represent, become null."""
    return json.dumps(_plain(document), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically and flush it to disk."""
    # several processes may write the same file, and process ids repeat across machines
    temporary = path.with_name(f".{path.name}-{uuid4().hex}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def surroundings(device: torch.device, processes: int) -> dict[str, Any]:
    """Return the environment of a run: memory, hardware, versions, commit, command."""
    return {
        "peak_memory_mib": round(_peak_memory(device) / 2**20, 1),
        "hardware": _hardware(device),
        "processes": processes,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "timm")},
        "commit": _commit(),
        "command": f"{_program()} {shlex.join(sys.argv[1:])}",
    }


def _program() -> str:
    """Return the program's name; argv[0] of `python -m package` is the path of its __main__.py."""
    path = Path(sys.argv[0])
    return f"python -m {path.parent.name}" if path.name == "__main__.py" else path.name


def _peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the GPU on CUDA, otherwise of this process without its workers."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {amount(os.cpu_count() or 1, 'core')}"


def _commit() -> str | None:
    """Return the commit of this package's git checkout, with "+" if it was modified; None if it is not in one."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # the environment may lie in the checkout of another project
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
