"""Checkpoints on disk: complete and verified, or absent. Knows files and tensors, not models.

    step-00000042/
        model.safetensors    a file per group of tensors
        optimizer.safetensors
        state.json           everything that is not a tensor
        MANIFEST.json        size and SHA-256 of each file, written last

No file is ever read in a way that could run code: safetensors and JSON only.
"""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from deepseek_mp.errors import CheckpointError, ConfigError, explain
from deepseek_mp.records.durable import DurableFile, sync_directory
from deepseek_mp.records.runfile import CHECKPOINTS
from deepseek_mp.trainer.checkpoint_store import (
    checkpoint_path,
    clear_leftovers,
    hidden_path,
    is_checkpoint_name,
    list_checkpoints,
    make_root,
    prune,
    publish,
    removed_on_failure,
)
from deepseek_mp.trainer.manifest import MANIFEST_FILE, FileEntry, Manifest, bad_checkpoint
from deepseek_mp.trainer.state_file import decode_state, encode_state
from deepseek_mp.trainer.tensor_file import check_tensors, read_tensors, write_tensors

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
TENSORS_SUFFIX = ".safetensors"

_WRITING = threading.RLock()
"""Held while one is written: of what lies half done under its process, a thread cannot tell whether it is another's."""

_STEM = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A training state at one step boundary.

    tensors: file stem ('model', 'optimizer', 'rng', ...) -> name -> tensor, on any device, with any
             strides, views and shared storage. One file is written for each stem.
    state:   what is not a tensor: JSON values, and those that `state_file` adds.
    """

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def write_checkpoint(root: str | os.PathLike[str], snapshot: Snapshot, *, keep: int | None = 3) -> Path:
    """Write `root/step-NNNNNNNN`, durable when this returns, and then remove older checkpoints.

    An existing checkpoint of the same step is replaced as a whole. `keep` is the number of complete
    checkpoints left, this one among them (None: all); directories that are not complete checkpoints
    are left alone.

    `CheckpointError` if the snapshot holds what cannot be stored, before anything is written, or if
    the disk does not take it; then older checkpoints are untouched and nothing of this one is left.

    Threads of a process write one after the other.
    """
    _check_snapshot(snapshot, keep)
    state = encode_state(snapshot.state)
    with _WRITING:
        return _written(Path(root), snapshot, state, keep)


def _written(root: Path, snapshot: Snapshot, state: bytes, keep: int | None) -> Path:
    final = checkpoint_path(root, snapshot.step)
    try:
        make_root(root)
        clear_leftovers(root)
        earlier = list_checkpoints(root)
        sequence = 1 + max((one.manifest.sequence for one in earlier), default=0)
        partial = hidden_path(final, "tmp")
        with removed_on_failure(partial):
            _write_files(partial, snapshot, state, sequence)
            publish(partial, final)
    except OSError as error:
        raise CheckpointError(
            explain(
                f"checkpoint {final} could not be written ({error})",
                "a disk with room and write permission",
                "Free space, or choose another directory; earlier checkpoints are intact",
            )
        ) from error
    if keep is not None:
        prune([one for one in earlier if one.path != final], keep - 1)
    return final


def read_checkpoint(path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Snapshot:
    """Verify every file of a checkpoint, then load it, tensors on `device` in memory of their own.

    Dtypes, strides and sharing within a file are as they were saved. `CheckpointError` with the path
    and the reason if anything is missing, changed, or not valid.
    """
    path = Path(path)
    manifest = Manifest.load(path)
    manifest.check_content(path)
    try:
        tensors = {
            name.removesuffix(TENSORS_SUFFIX): read_tensors(path / name, entry.layout, torch.device(device))
            for name, entry in manifest.files.items()
            if name.endswith(TENSORS_SUFFIX)
        }
        state = decode_state((path / STATE_FILE).read_bytes())
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise bad_checkpoint(path, f"has files that are not valid ({type(error).__name__}: {error})") from error
    return Snapshot(step=manifest.step, tensors=tensors, state=state)


def verify_checkpoint(path: str | os.PathLike[str]) -> None:
    """`CheckpointError` with the path and the reason unless every file has its size and SHA-256.

    Files that the manifest does not list are named in a warning; nothing ever opens them.
    """
    path = Path(path)
    manifest = Manifest.load(path)
    manifest.check_content(path)
    extra = sorted({entry.name for entry in path.iterdir()} - manifest.files.keys() - {MANIFEST_FILE})
    if extra:
        logger.warning("%s holds files that are no part of it and are not read: %s", path, ", ".join(extra))


def newest_checkpoint(root: str | os.PathLike[str]) -> Path | None:
    """The checkpoint written last of those that verify, or None; each one passed over is logged.

    `root` may be a run directory, a directory of checkpoints, or one checkpoint.
    """
    for path in _newest_first(Path(root)):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
        else:
            return path
    return None


def _newest_first(root: Path) -> list[Path]:
    if is_checkpoint_name(root.name) or (root / MANIFEST_FILE).is_file():
        return [root]
    inside = root / CHECKPOINTS
    return [one.path for one in list_checkpoints(inside if inside.is_dir() else root)]


def _check_snapshot(snapshot: Snapshot, keep: int | None) -> None:
    if keep is not None and keep < 1:
        raise ConfigError(explain(f"keep={keep}", "None, or 1 and more", "Keep at least one checkpoint"))
    if snapshot.step < 0:
        raise CheckpointError(explain(f"step {snapshot.step}", "0 and more", "Count steps from 0"))
    for stem, tensors in snapshot.tensors.items():
        if not _STEM.fullmatch(stem):
            raise CheckpointError(
                explain(f"tensor file {stem!r}", "letters, digits, '_' and '-'", "Use a name such as 'model'")
            )
        check_tensors(stem, tensors)


def _write_files(directory: Path, snapshot: Snapshot, state: bytes, sequence: int) -> None:
    """Fill a new directory; the manifest is last, and everything is on the disk afterwards."""
    directory.mkdir()
    entries: dict[str, FileEntry] = {}
    for stem, tensors in snapshot.tensors.items():
        with DurableFile(directory / (stem + TENSORS_SUFFIX)) as file:
            layout = write_tensors(file, tensors)
            file.finish()
        entries[stem + TENSORS_SUFFIX] = FileEntry(size=file.size, sha256=file.sha256, layout=layout)
    entries[STATE_FILE] = _write_bytes(directory / STATE_FILE, state)
    manifest = Manifest(step=snapshot.step, sequence=sequence, files=entries)
    _write_bytes(directory / MANIFEST_FILE, manifest.to_bytes())
    sync_directory(directory)


def _write_bytes(path: Path, data: bytes) -> FileEntry:
    with DurableFile(path) as file:
        file.write(data)
        file.finish()
    return FileEntry(size=file.size, sha256=file.sha256)
