"""The manifest vouches for every byte of a checkpoint, its own included, and for nothing outside it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from deepseek_mp.errors import CheckpointError
from deepseek_mp.trainer.manifest import CHECKPOINT_VERSION, MANIFEST_FILE, FileEntry, Manifest


def entry(data: bytes, **changes: Any) -> FileEntry:
    return FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest(), **changes)


def make(directory: Path) -> Manifest:
    (directory / "a.bin").write_bytes(b"some bytes")
    files = {"a.bin": entry(b"some bytes", layout={"w": {"stride": [1, 2]}})}
    manifest = Manifest(step=7, sequence=3, files=files)
    (directory / MANIFEST_FILE).write_bytes(manifest.to_bytes())
    return manifest


def sign(data: dict[str, Any]) -> bytes:
    """What the documentation says a manifest is: its SHA-256 is taken with zeros in the digest's place."""
    text = json.dumps({**data, "sha256": "0" * 64}).encode()
    return text.replace(b"0" * 64, hashlib.sha256(text).hexdigest().encode(), 1)


def content(directory: Path) -> dict[str, Any]:
    return json.loads((directory / MANIFEST_FILE).read_bytes())


def test_it_comes_back(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    manifest.check_content(tmp_path)


def test_the_documented_digest_is_the_one_written(tmp_path: Path) -> None:
    make(tmp_path)
    data = content(tmp_path)
    (tmp_path / MANIFEST_FILE).write_bytes(sign(data))
    assert Manifest.load(tmp_path).step == 7


def test_every_byte_of_a_manifest_counts(tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / MANIFEST_FILE
    good = path.read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"corrupt manifest|is of version"):
            Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": CHECKPOINT_VERSION + 1}, r"is of version 2.*versions up to 1.*newer release"),
        ({"version": 0}, "corrupt manifest"),
        ({"version": None}, "corrupt manifest"),
        ({"format": "something else"}, "corrupt manifest"),
        ({"step": "x"}, "corrupt manifest"),
        ({"files": []}, "corrupt manifest"),
        ({"files": {"a.bin": {"size": 10}}}, "corrupt manifest"),
        ({"files": {"a.bin": {"size": 10, "sha256": "", "code": "x"}}}, "corrupt manifest"),
    ],
)
def test_a_manifest_of_another_kind_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    make(tmp_path)
    (tmp_path / MANIFEST_FILE).write_bytes(sign(content(tmp_path) | change))
    with pytest.raises(CheckpointError, match=message):
        Manifest.load(tmp_path)


def test_a_newer_version_is_told_from_corruption_whatever_its_digest(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / MANIFEST_FILE).write_text(json.dumps({"format": "deepseek_mp checkpoint", "version": 2}))
    with pytest.raises(CheckpointError, match=r"is of version 2"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../a.bin", "/etc/passwd", "..", ".", "", "sub/a.bin", "sub\\a.bin", "a\0b", ".hidden", MANIFEST_FILE, "a\n"],
)
def test_a_path_that_is_not_a_file_beside_it_is_refused(tmp_path: Path, name: str) -> None:
    make(tmp_path)
    data = content(tmp_path)
    (tmp_path / MANIFEST_FILE).write_bytes(sign(data | {"files": {name: data["files"]["a.bin"]}}))
    with pytest.raises(CheckpointError, match="which is not a file in it"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("text", [b"", b"null", b"[]", b"{}", b"\x80", b"[" * 100_000, b'{"version": 1}'])
def test_other_text_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(text)
    with pytest.raises(CheckpointError, match="corrupt manifest"):
        Manifest.load(tmp_path)


def test_an_oversized_manifest_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / MANIFEST_FILE).open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room on the disk, and would not fit in memory
    with pytest.raises(CheckpointError, match="larger than 268435456 bytes"):
        Manifest.load(tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no MANIFEST.json, so it was not finished"):
        Manifest.load(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        Manifest.load(tmp_path / "none")


def test_files_must_be_there_whole_and_unchanged(tmp_path: Path) -> None:
    manifest = make(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"some bytez")
    manifest.check_sizes(tmp_path)
    with pytest.raises(CheckpointError, match=r"is corrupt: a\.bin has SHA-256"):
        manifest.check_content(tmp_path)
    (tmp_path / "a.bin").write_bytes(b"some")
    with pytest.raises(CheckpointError, match=r"has a\.bin of 4 bytes instead of 10"):
        manifest.check_sizes(tmp_path)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(CheckpointError, match=r"lacks the file a\.bin"):
        manifest.check_sizes(tmp_path)
    (tmp_path / "a.bin").mkdir()
    with pytest.raises(CheckpointError, match=r"lacks the file a\.bin"):
        manifest.check_content(tmp_path)
