"""MANIFEST.json: which files make a checkpoint, with the size and SHA-256 of each, and of itself.

The manifest is written last, so a directory that has one is complete; its own digest covers every
byte of it, with the 64 digits of the digest itself replaced by zeros. Nothing that is not listed
here is ever opened.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from deepseek_mp.errors import CheckpointError, explain
from deepseek_mp.records.durable import file_sha256

CHECKPOINT_VERSION = 1
CHECKPOINT_FORMAT = "deepseek_mp checkpoint"
MANIFEST_FILE = "MANIFEST.json"
MANIFEST_LIMIT = 1 << 28
"""Bytes; a larger manifest is refused unread."""

_NO_DIGEST = "0" * 64
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One file: its size in bytes, its SHA-256, and for tensors their layout (see `tensor_file`)."""

    size: int
    sha256: str
    layout: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        entry: dict[str, Any] = {"size": self.size, "sha256": self.sha256}
        return entry | ({"layout": self.layout} if self.layout else {})


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a checkpoint directory.

    `sequence` counts the checkpoints written to one place, so that the newest is known also when a
    run went back to an earlier step.
    """

    step: int
    sequence: int
    files: Mapping[str, FileEntry]

    def to_bytes(self) -> bytes:
        """The text of MANIFEST.json, with its own digest in place."""
        text = json.dumps(
            {
                "format": CHECKPOINT_FORMAT,
                "version": CHECKPOINT_VERSION,
                "sha256": _NO_DIGEST,
                "step": self.step,
                "sequence": self.sequence,
                "files": {name: entry.to_json() for name, entry in self.files.items()},
            },
            indent=1,
        ).encode()
        return text.replace(_NO_DIGEST.encode(), hashlib.sha256(text).hexdigest().encode(), 1)

    @classmethod
    def load(cls, directory: Path) -> Self:
        """The manifest of a checkpoint directory; `CheckpointError` if there is none that can be trusted."""
        path = directory / MANIFEST_FILE
        try:
            if path.stat().st_size > MANIFEST_LIMIT:
                raise ValueError(f"larger than {MANIFEST_LIMIT} bytes")
            text = path.read_bytes()
            data = json.loads(text)
            _check_header(directory, data, text)
            files = {name: FileEntry(**entry) for name, entry in data["files"].items()}
            manifest = cls(step=int(data["step"]), sequence=int(data["sequence"]), files=files)
        except FileNotFoundError as error:
            what = "has no MANIFEST.json, so it was not finished" if directory.is_dir() else "does not exist"
            raise bad_checkpoint(directory, what) from error
        except CheckpointError:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise bad_checkpoint(directory, f"has a corrupt manifest ({type(error).__name__}: {error})") from error
        for name in files:
            if not _FILE_NAME.fullmatch(name) or name == MANIFEST_FILE:
                raise bad_checkpoint(directory, f"has a manifest that names {name!r}, which is not a file in it")
        return manifest

    def check_sizes(self, directory: Path) -> None:
        """`CheckpointError` unless every file is there with its size; reads no content."""
        for name, entry in self.files.items():
            path = directory / name
            if not path.is_file():
                raise bad_checkpoint(directory, f"lacks the file {name}")
            if (size := path.stat().st_size) != entry.size:
                raise bad_checkpoint(directory, f"has {name} of {size} bytes instead of {entry.size}")

    def check_content(self, directory: Path) -> None:
        """`CheckpointError` unless every file has its size and its SHA-256; reads all of them."""
        self.check_sizes(directory)
        for name, entry in self.files.items():
            try:
                found = file_sha256(directory / name)
            except OSError as error:
                raise bad_checkpoint(directory, f"has a file that cannot be read ({error})") from error
            if found != entry.sha256:
                raise bad_checkpoint(directory, f"is corrupt: {name} has SHA-256 {found}, not {entry.sha256}")


def bad_checkpoint(directory: Path, what: str) -> CheckpointError:
    """The error for a checkpoint that must not be used: its path, and what is wrong with it."""
    return CheckpointError(
        explain(f"checkpoint {directory} {what}", "a complete checkpoint that verifies", "Resume from another one")
    )


def _check_header(directory: Path, data: Mapping[str, Any], text: bytes) -> None:
    """Version first, since a newer one may be built in another way; then the digest of every byte."""
    version = data["version"]
    if data["format"] == CHECKPOINT_FORMAT and isinstance(version, int) and version > CHECKPOINT_VERSION:
        raise CheckpointError(
            explain(
                f"checkpoint {directory} is of version {version}",
                f"versions up to {CHECKPOINT_VERSION}",
                "Read it with a newer release of deepseek-mp",
            )
        )
    digest = data["sha256"].encode()
    bare = text.replace(digest, _NO_DIGEST.encode(), 1) if len(digest) == len(_NO_DIGEST) else text
    if hashlib.sha256(bare).hexdigest().encode() != digest:
        raise ValueError("its SHA-256 does not match its text")
    if data["format"] != CHECKPOINT_FORMAT or version != CHECKPOINT_VERSION:
        raise ValueError(f"format {data['format']!r}, version {version!r}")
