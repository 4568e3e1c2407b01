"""A file that is whole at its path or not there: checked before, written beside it, moved into its place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.records.durable import beside, sync_directory


def as_path(path: Any) -> Path:
    """The path; `ConfigError` for what names none."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        passed = f"path={path!r} of type {type(path).__name__}"
        raise ConfigError(explain(passed, "text or a Path", "Name a file"))
    return Path(path)


def checked(path: str | Path) -> Path:
    """The path of a file that can be written; `ConfigError` for a directory, or in one that does not exist.

    And for a device or a pipe: what takes its place would be a file for all programs, as of /dev/null.
    """
    target = as_path(path)
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise ConfigError(explain(f"path={str(path)!r}, no file", "a file that can be written", "Name a file"))
    if target.is_dir() or not target.parent.is_dir():
        what = "a directory" if target.is_dir() else "in a directory that does not exist"
        raise ConfigError(explain(f"path={str(path)!r}, {what}", "a file that can be written", "Name a file"))
    return target


@contextmanager
def whole_file(target: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes the place of `target` once the region ends; an exception leaves that as it is.

    Raises:
        OSError: the system lets no file be written there, as for want of permission or room.
    """
    temporary = beside(target)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with suppress(OSError):  # it may never have come to be
            temporary.unlink()
        raise
    sync_directory(target.parent)
