"""A directory of checkpoints: their names, which can be read, putting one in place, removing old ones.

    checkpoints/
        step-00000042/            one checkpoint
        .step-00000043.tmp-977/   being written by process 977

A checkpoint is written beside its final place, flushed to the disk, and renamed; only then are older
ones removed. A process killed at any moment leaves the older checkpoints as they were, and at most
hidden directories, which the next save clears away. Two hidden names more exist for an instant:
`.old-` holds a checkpoint while another takes its place, and counts as one until that has happened;
`.del-` holds one that is being removed, and never counts.

One process at a time writes to a directory; any number may read.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deepseek_mp.errors import CheckpointError
from deepseek_mp.records.durable import sync_directory
from deepseek_mp.trainer.manifest import Manifest

logger = logging.getLogger(__name__)

_VISIBLE = re.compile(r"step-\d{8,}")
_HIDDEN = re.compile(r"\.(?P<name>step-\d{8,})\.(?P<kind>tmp|old|del)-(?P<pid>\d+)")


@dataclass(frozen=True)
class Found:
    """A checkpoint directory whose manifest can be read; its files are not looked at yet."""

    path: Path
    manifest: Manifest


def is_checkpoint_name(name: str) -> bool:
    """Whether a directory of this name is a checkpoint rather than a directory of them."""
    return _VISIBLE.fullmatch(name) is not None


def checkpoint_path(root: Path, step: int) -> Path:
    """Where the checkpoint of a step belongs."""
    return root / f"step-{step:08d}"


def hidden_path(final: Path, kind: Literal["tmp", "old", "del"]) -> Path:
    """The name beside `final` under which this process handles it for the moment."""
    return final.with_name(f".{final.name}.{kind}-{os.getpid()}")


def list_checkpoints(root: Path) -> list[Found]:
    """The checkpoints in a directory with a readable manifest, the one written last first.

    The others are logged with the reason. Files are not verified.
    """
    found: list[Found] = []
    for path in _candidates(root):
        try:
            found.append(Found(path, Manifest.load(path)))
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
    return sorted(found, key=lambda one: (one.manifest.sequence, one.manifest.step), reverse=True)


def make_root(root: Path) -> None:
    """Create a directory, and make its name and those of the parents made with it durable."""
    missing = [path for path in (root, *root.parents) if not path.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_directory(path.parent)


def clear_leftovers(root: Path) -> None:
    """Remove what killed processes left half done; bring back a checkpoint that was not yet replaced."""
    for path in sorted(root.iterdir()):
        match = _HIDDEN.fullmatch(path.name)
        if match is None or _belongs_to_another(int(match["pid"])):
            continue
        final = root / match["name"]
        if match["kind"] == "old" and not final.exists():
            path.rename(final)
        else:
            remove(path)


@contextmanager
def removed_on_failure(partial: Path) -> Iterator[None]:
    """Leave no part of a checkpoint behind if the block fails for any reason."""
    try:
        yield
    except BaseException:
        if partial.exists():
            remove(partial)
        raise


def publish(partial: Path, final: Path) -> None:
    """Give a finished directory its name. At every moment it, or the one it replaces, can be found."""
    displaced = hidden_path(final, "old") if final.exists() else None
    if displaced is not None:
        final.rename(displaced)
    try:
        partial.rename(final)
    except OSError:
        if displaced is not None:
            displaced.rename(final)
        raise
    sync_directory(final.parent)
    if displaced is not None:
        remove(displaced)


def prune(checkpoints: Sequence[Found], keep: int) -> None:
    """Remove complete checkpoints but for the first `keep`; whatever goes wrong is a warning.

    A directory that lacks a file is left alone and does not count: it is no substitute for a good
    one, and someone may want to look at it.
    """
    complete: list[Path] = []
    for one in checkpoints:
        try:
            one.manifest.check_sizes(one.path)
            complete.append(one.path)
        except CheckpointError as error:
            logger.warning("left in place, and not counted among those to keep: %s", error)
    for path in complete[keep:]:
        doomed = hidden_path(path, "del")
        try:
            path.rename(doomed)
        except OSError as error:
            logger.warning("old checkpoint %s could not be removed: %s", path, error)
        else:
            remove(doomed)


def remove(path: Path) -> None:
    """Delete a directory; a failure is logged, since what is left is never taken for a checkpoint."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s could not be removed: %s", path, error)


def _candidates(root: Path) -> list[Path]:
    """Directories that may be checkpoints: visible ones, and those displaced but not yet replaced."""
    if not root.is_dir():
        return []
    entries = sorted(root.iterdir())
    visible = {path.name: path for path in entries if is_checkpoint_name(path.name)}
    for path in entries:
        match = _HIDDEN.fullmatch(path.name)
        if match is not None and match["kind"] == "old":
            visible.setdefault(match["name"], path)
    return list(visible.values())


def _belongs_to_another(pid: int) -> bool:
    """Whether a living process other than this one has this id."""
    if pid == os.getpid():
        return False
    if os.name == "nt":
        return True  # signal 0 is not a question there
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
