"""Leftovers of dead processes are cleared, displaced checkpoints still count, removal never hurts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepseek_mp.errors import CheckpointError
from deepseek_mp.trainer import checkpoint_store
from deepseek_mp.trainer.checkpoint import Snapshot, newest_checkpoint, read_checkpoint, write_checkpoint


def save(root: Path, step: int, *, keep: int | None = 3, mark: int = 0) -> Path:
    tensors = {"model": {"w": torch.full((3,), float(step))}}
    return write_checkpoint(root, Snapshot(step=step, tensors=tensors, state={"mark": mark}), keep=keep)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


@pytest.fixture(scope="module")
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("kind", ["tmp", "del"])
def test_what_dead_processes_left_half_done_is_cleared(tmp_path: Path, dead_pid: int, kind: str) -> None:
    for pid in (dead_pid, os.getpid(), 10**30):
        (tmp_path / f".step-00000009.{kind}-{pid}" / "deep").mkdir(parents=True)
    save(tmp_path, 1)
    assert names(tmp_path) == ["step-00000001"]


def test_what_a_living_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / f".step-00000009.tmp-{os.getppid()}"
    other.mkdir()
    save(tmp_path, 1)
    assert other.exists()


def test_a_process_of_another_user_is_a_living_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, signal: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    (tmp_path / ".step-00000009.tmp-1").mkdir()
    save(tmp_path, 1)
    assert ".step-00000009.tmp-1" in names(tmp_path)


def test_other_files_in_the_directory_are_left_alone(tmp_path: Path) -> None:
    for name in ("notes.txt", ".step-1.tmp-x", "step-1", "step-000000010.bak", ".step-00000001.tmp-"):
        (tmp_path / name).write_text("mine")
    before = names(tmp_path)
    for step in range(5):
        save(tmp_path, step, keep=1)
    assert names(tmp_path) == sorted([*before, "step-00000004"])


def test_a_checkpoint_displaced_when_the_process_died_still_counts_and_comes_back(
    tmp_path: Path, dead_pid: int
) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2, mark=7)
    displaced = path.rename(tmp_path / f".step-00000002.old-{dead_pid}")
    assert newest_checkpoint(tmp_path) == displaced
    assert read_checkpoint(displaced).state == {"mark": 7}
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000003"]
    assert read_checkpoint(path).state == {"mark": 7}


def test_a_displaced_checkpoint_gives_way_to_the_one_that_replaced_it(tmp_path: Path, dead_pid: int) -> None:
    path = save(tmp_path, 2, mark=1)
    shutil.copytree(path, tmp_path / f".step-00000002.old-{dead_pid}")
    assert newest_checkpoint(tmp_path) == path
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_a_failed_removal_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError("not yours")

    for step in (1, 2):
        save(tmp_path, step)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    path = save(tmp_path, 3, keep=1)
    assert newest_checkpoint(tmp_path) == path
    assert caplog.text.count("could not be removed: not yours") == 2
    monkeypatch.undo()
    save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["step-00000004"]


def test_a_refused_rename_of_an_old_one_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if ".del-" in target.name:
            raise PermissionError("not yours")
        return rename(path, target)

    save(tmp_path, 1)
    monkeypatch.setattr(Path, "rename", refuse)
    save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert "could not be removed: not yours" in caplog.text


def test_broken_checkpoints_do_not_count_among_those_kept_and_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=None)
    (tmp_path / "step-00000003" / "model.safetensors").write_bytes(b"")
    (tmp_path / "step-00000004" / "MANIFEST.json").unlink()
    save(tmp_path, 5, keep=2)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004", "step-00000005"]
    assert "left in place, and not counted" in caplog.text


def test_nothing_is_removed_before_the_new_one_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    rename, sync, rmtree = Path.rename, checkpoint_store.sync_directory, shutil.rmtree

    def renaming(path: Path, target: Path) -> Path:
        events.append("publish" if target.name.startswith("step-") else "set aside")
        return rename(path, target)

    def syncing(path: Path) -> None:
        events.append("sync root" if path == tmp_path else "sync")
        sync(path)

    def removing(path: Path) -> None:
        events.append("remove")
        rmtree(path)

    save(tmp_path, 1)
    monkeypatch.setattr(Path, "rename", renaming)
    monkeypatch.setattr(checkpoint_store, "sync_directory", syncing)
    monkeypatch.setattr(shutil, "rmtree", removing)
    save(tmp_path, 2, keep=1)
    assert events == ["publish", "sync root", "set aside", "remove"]


@pytest.mark.parametrize("replacing", [False, True])
def test_a_failed_publication_puts_everything_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replacing: bool
) -> None:
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if ".tmp-" in path.name:
            raise OSError(5, "I/O error")
        return rename(path, target)

    path = save(tmp_path, 1, mark=1)
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match=r"could not be written.*I/O error"):
        save(tmp_path, 1 if replacing else 2, mark=2)
    assert names(tmp_path) == ["step-00000001"]
    assert read_checkpoint(path).state == {"mark": 1}
