"""Files are whole or absent, and hashed as they are written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from deepseek_mp.records import durable
from deepseek_mp.records.durable import DurableFile, beside, file_sha256, replace_text


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 100])
def test_size_and_digest_are_those_of_the_file(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "BLOCK_BYTES", 16)
    data = bytes(range(size))
    with DurableFile(tmp_path / "x") as file:
        file.write(data[:5])
        file.write(memoryview(data)[5:])
        file.finish()
    assert (tmp_path / "x").read_bytes() == data
    assert file.size == size
    assert file.sha256 == hashlib.sha256(data).hexdigest() == file_sha256(tmp_path / "x")


def test_finish_hands_the_file_to_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    with DurableFile(tmp_path / "x") as file:
        file.write(b"abc")
        file.finish()
    assert sizes == [3]


def test_an_existing_file_is_never_written_into(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(FileExistsError, match="x"):
        DurableFile(tmp_path / "x")
    assert (tmp_path / "x").read_text() == "old"


def test_replaced_text_is_durable_before_it_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")
    seen: list[str] = []
    fsync = os.fsync

    def syncing(descriptor: int) -> None:
        seen.append(path.read_text())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", syncing)
    replace_text(path, "new")
    assert seen == ["old", "new"]  # the file's data before the rename, the directory after it
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_failed_replacement_leaves_the_old_text_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.json"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["run.json"]


def test_a_name_beside_is_hidden_and_another_at_every_call(tmp_path: Path) -> None:
    one, other = beside(tmp_path / "run.json"), beside(tmp_path / "run.json")
    assert one != other
    assert one.parent == tmp_path
    assert one.name.startswith(".run.json.tmp-")


def test_replacements_of_one_path_at_once_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, fsync, waiting = tmp_path / "run.json", os.fsync, ["second"]

    def syncing(descriptor: int) -> None:
        if waiting:
            replace_text(path, waiting.pop())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", syncing)
    replace_text(path, "first")
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["run.json"]
