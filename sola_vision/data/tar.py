# SPDX-License-Identifier: Apache-2.0
"""Random access to the members of plain .tar files, without unpacking them.

`index` reads the headers once (about a second for 50,000 members) and returns each regular file's offset and size;
`read` reads bytes by these. File handles are opened per process, so data loaders may fork or spawn.
"""

import os
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple


class Member(NamedTuple):
    """One entry of an archive; `parts` is its path, empty if it must not be used (link, "..", device)."""

    parts: tuple[str, ...]
    is_folder: bool
    offset: int
    size: int


class Archive(NamedTuple):
    """A .tar file and its modification time when it was indexed."""

    path: str
    changed: int

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> "Archive":
        """Return the archive at `path` with its current modification time."""
        return cls(os.fspath(path), os.stat(path).st_mtime_ns)


def index(archive: Archive) -> Iterator[Member]:
    """Yield every member, in the order of the archive."""
    try:
        # "r:" refuses compressed archives, which cannot be read by offset
        with tarfile.open(archive.path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            while (info := tar.next()) is not None:
                # tarfile keeps each member (1 kB); a million of them would fill the memory
                tar.members.clear()  # type: ignore[attr-defined]  # its stubs leave the list out
                yield _member(info)
            _check_end(archive, tar.offset)
    except tarfile.TarError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{archive.path}: not a complete, uncompressed tar archive ({reason}); copy or download it again, "
            "or unpack it and pack it without compression"
        ) from None


def read(archive: Archive, offset: int, size: int) -> bytes:
    """Return `size` bytes at `offset`."""
    if not hasattr(os, "pread"):  # Windows
        with open(archive.path, "rb") as stream:
            stream.seek(offset)
            return stream.read(size)
    # pread does not move the file position, so threads may share the handle
    return os.pread(_handle(archive, os.getpid()).descriptor, size, offset)


def _member(info: tarfile.TarInfo) -> Member:
    parts = tuple(part for part in info.name.split("/") if part not in ("", "."))
    plain = info.isdir() or (info.isreg() and not info.issparse())
    if not plain or ".." in parts or info.name.startswith("/"):
        parts = ()
    return Member(parts, info.isdir(), info.offset_data, info.size)


def _check_end(archive: Archive, offset: int) -> None:
    """Raise ReadError unless only zeros follow; tarfile takes a damaged header or the end of the file as the end."""
    with open(archive.path, "rb") as stream:
        stream.seek(offset)
        if len(block := stream.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"cut off at byte {offset + len(block)}")
        # writers pad the last record, usually to 10 kB but possibly to any length
        while block:
            if block.count(0) < len(block):
                raise tarfile.ReadError(f"damaged at byte {offset}, or followed by another archive")
            block = stream.read(1 << 20)


class _Handle:
    def __init__(self, archive: Archive) -> None:
        self.descriptor = -1
        self.descriptor = os.open(archive.path, os.O_RDONLY)
        if os.fstat(self.descriptor).st_mtime_ns != archive.changed:
            raise OSError(f"{archive.path}: changed since it was indexed; start again")

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


# bounded, because a thousand shards per worker would exceed the usual limit of open files
@lru_cache(maxsize=128)
def _handle(archive: Archive, process: int) -> _Handle:
    return _Handle(archive)
