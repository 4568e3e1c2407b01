"""Files that are whole on the disk or not there at all: hashed writes, fsync, atomic replacement.

A program can be killed, and a machine can lose power, between any two operations. Three facts are
enough to build on: a rename on one filesystem is atomic; what was fsynced before the rename is in
the renamed file; and the rename itself is kept once the directory that holds the name is fsynced.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

BLOCK_BYTES = 8 << 20
"""Bytes are hashed and written in turn, a block at a time, so that a block is still in the cache."""


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable. Windows has no such call, and orders renames itself."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def beside(path: Path) -> Path:
    """A hidden name in the same directory, another at every call: also threads of one process write to one path.

    Open it as a new file ('x'): it then has the permissions of any other, which `tempfile` would keep to its owner.
    """
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in lower-case hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class DurableFile:
    """A new file that is hashed while it is written, and on the disk once `finish` has returned.

    `size` (bytes) and `sha256` (lower-case hexadecimal) describe what was written so far.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes; a memoryview must be contiguous, and is not copied."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), BLOCK_BYTES):
            block = view[start : start + BLOCK_BYTES]
            self._hash.update(block)
            self._file.write(block)
        self.size += len(view)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def finish(self) -> None:
        """Hand everything to the disk and wait until it is there."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def replace_text(path: Path, text: str) -> None:
    """Write a whole file in place of an older one: readers see the old text or the new, never a part."""
    temporary = beside(path)
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    sync_directory(path.parent)
