# SPDX-License-Identifier: Apache-2.0
"""What a run tells: metrics.jsonl and TensorBoard for machines, standard error for people, a summary for both.

Only the first process writes. Standard output stays free for results.
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

METRICS = Path("metrics.jsonl")
SUMMARY = Path("summary.json")

_TAKEN = "another process is training there: wait for its end or choose another folder"

_log = logging.getLogger("sola_vision")


class Log:
    """`keep` is the length of metrics.jsonl that the resumed state knows of; what a killed run wrote after it goes."""

    def __init__(self, folder: Path, *, main: bool, total: int, step: int = 0, keep: int = 0) -> None:
        self.main = main
        self.total = total
        self.started_at = step
        if not main:
            return
        # slow to import, and only training needs it
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / METRICS).open("ab")
        if not _lock(self._file):
            raise ValueError(f"{folder}: {_TAKEN}")
        self._file.truncate(min(keep, self._file.tell()))
        # what came later in the folder, from a killed run or from one that failed at its start, counts no more
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

    def say(self, text: str) -> None:
        """One line for people."""
        if self.main:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def record(self, kind: str, step: int, epoch: float, numbers: Mapping[str, float]) -> None:
        """One line of metrics.jsonl, and the same in TensorBoard. JSON has no nan: such a number becomes null."""
        if not self.main:
            return
        line = {"kind": kind, "step": step, "epoch": round(epoch, 4), **_plain(numbers)}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        for name, value in numbers.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def progress(self, step: int, epoch: float, numbers: Mapping[str, float] | None = None, left: float = 0) -> None:
        """Moves the bar; without a terminal, one line whenever there are `numbers`."""
        if not self.main:
            return
        text = "" if numbers is None else "  ".join(f"{name} {value:.3g}" for name, value in numbers.items())
        if self._bar is not None:
            fields: dict[str, Any] = {} if numbers is None else {"numbers": text}
            self._bar.update(self._task, completed=step, description=f"epoch {epoch:.1f}", **fields)
        elif numbers is not None:
            self.say(f"epoch {epoch:.2f}  step {step}/{self.total}  {text}  {_duration(left)} left")

    def position(self) -> int:
        """Length of metrics.jsonl, all of it on the disk."""
        if not self.main:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        if self.main:
            if self._bar is not None:
                self._bar.stop()
            self._board.close()
            self._file.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def check_untaken(folder: Path) -> None:
    """Refuses a folder in which another process of this machine writes the metrics of a run."""
    path = folder / METRICS
    if path.is_file():
        with path.open("rb") as file:
            if not _lock(file, shared=True):  # all processes of a run may ask at once
                raise ValueError(f"{folder}: {_TAKEN}")


def _lock(file: IO[bytes], shared: bool = False) -> bool:
    """False if another process has locked the file. Any end of a process unlocks it; its workers inherit no lock."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)  # a file system may know no locks
    return True


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl. One that is damaged is named and left out: the run it tells of is worth more."""
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict) and {"kind", "step", "epoch"} <= record.keys():
            records.append(record)
        else:
            _log.warning("%s: line %d is no record and is left out", path, number)
    return records


def write_json(path: Path, document: Any) -> None:
    """`json_text`, as `write_text` writes."""
    write_text(path, json_text(document) + "\n")


def json_text(document: Any) -> str:
    """Indented. JSON has no nan: such a number, which is a metric of nothing, becomes null."""
    return json.dumps(_plain(document), indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> None:
    """Replaced at once or not at all, and nothing of it lost when the power goes."""
    # several may write one file, and numbers of processes are the same on several machines
    beside = path.with_name(f".{path.name}-{uuid4().hex}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def surroundings(device: torch.device, processes: int) -> dict[str, Any]:
    """Where a run took place: hardware, versions, commit, command."""
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
    """`python -m package` shows as the path of its __main__.py."""
    path = Path(sys.argv[0])
    return f"python -m {path.parent.name}" if path.name == "__main__.py" else path.name


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, else of this process without its workers."""
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
    return f"{name}, {os.cpu_count()} cores"


def _commit() -> str | None:
    """Commit of this package's checkout, with a plus if it was changed; None when it is installed without one."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an environment may lie in somebody else's checkout
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
