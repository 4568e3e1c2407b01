"""Checkpoints under kills, full disks, damage and malice, beside what torch.save does then.

The letters and numbers in the names are those of the project's list of faults, section F.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deepseek_mp.errors import CheckpointError
from deepseek_mp.records.durable import DurableFile
from deepseek_mp.trainer.checkpoint import (
    Snapshot,
    newest_checkpoint,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from deepseek_mp.trainer.manifest import MANIFEST_FILE, FileEntry, Manifest

CHILD = Path(__file__).with_name("checkpoint_child.py")
FILES = ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"]

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


@pytest.fixture
def fast_dir() -> Iterator[Path]:
    """A directory in memory where there is one: hundreds of saves there do not wait for a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as path:
        yield Path(path)


def child(*arguments: object) -> dict[str, Any]:
    """What a command of checkpoint_child.py prints."""
    done = subprocess.run(
        [sys.executable, str(CHILD), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def save(root: Path, step: int, **changes: Any) -> Path:
    mark = float(step)
    tensors = {"model": {"w": torch.full((6, 4), mark)}, "optimizer": {"exp_avg": torch.full((5,), mark)}}
    return write_checkpoint(root, Snapshot(step=step, tensors=tensors, state={"step": step}, **changes))


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def resign(path: Path) -> None:
    """Make the manifest agree with the files, as someone who means harm would."""
    old = Manifest.load(path)
    fresh: dict[str, FileEntry] = {}
    for name, entry in old.files.items():
        copy = path.with_name("copy")
        with DurableFile(copy) as file:
            file.write((path / name).read_bytes())
        fresh[name] = FileEntry(size=file.size, sha256=file.sha256, layout=entry.layout)
        copy.unlink()
    (path / MANIFEST_FILE).write_bytes(Manifest(step=old.step, sequence=old.sequence, files=fresh).to_bytes())


# ------------------------------------------------------------------------------------ F01 kills


@needs_fork
def test_f01_fifty_kills_at_random_moments_of_a_save(tmp_path: Path) -> None:
    result = child("kill_loop", tmp_path, 50, 1)
    assert result["kills"] == 50
    cut_short = {phase: count for phase, count in result["phases"].items() if phase.startswith("tmp")}
    assert sum(cut_short.values()) >= 5, result  # the kills did land inside saves,
    assert len(cut_short) >= 3, result  # and with different numbers of files written


@needs_fork
def test_f01_a_kill_at_every_point_between_two_operations(fast_dir: Path) -> None:
    points = child("kill_points", fast_dir)
    assert points.keys() == {"first", "new", "replace"}
    assert min(points.values()) >= 12, points


@pytest.fixture(scope="module")
def limits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Something good that was saved over, under a limit or a kill: the directory and what was seen."""
    root = tmp_path_factory.mktemp("limits")
    return root, child("limits", root)


@needs_fork
def test_f01_torch_save_destroys_the_file_it_overwrites(limits: tuple[Path, dict[str, Any]]) -> None:
    path = limits[0] / "killed.pt"
    assert path.stat().st_size == 500_000
    with pytest.raises(RuntimeError, match="failed finding central directory"):
        torch.load(path, weights_only=True)


# -------------------------------------------------------------------------------- F02 full disk


@needs_fork
def test_f02_a_file_that_may_not_grow(limits: tuple[Path, dict[str, Any]]) -> None:
    result = limits[1]["checkpoint"]
    assert result["cause"] == "EFBIG"
    assert "step-00000002 could not be written" in result["error"]
    assert result["left"] == ["step-00000001"]
    assert result["generation"] == 1


@needs_fork
def test_f02_torch_save_leaves_a_broken_file_in_place_of_the_good_one(limits: tuple[Path, dict[str, Any]]) -> None:
    path = limits[0] / "full.pt"
    assert path.stat().st_size == 1_000_000
    with pytest.raises(RuntimeError, match="failed finding central directory"):
        torch.load(path, weights_only=True)


class Failing:
    """Stands for an operation that fails with an error of the disk at its `moment`-th call."""

    def __init__(self, original: Any, moment: int, code: int = errno.ENOSPC) -> None:
        self.original, self.left, self.code = original, moment, code

    def __call__(self, *arguments: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            raise OSError(self.code, os.strerror(self.code))
        return self.original(*arguments)


@pytest.mark.parametrize(
    ("owner", "operation"),
    [(os, "fsync"), (DurableFile, "write"), (os, "mkdir"), (os, "rename")],
    ids=["fsync", "write", "mkdir", "rename"],
)
@pytest.mark.parametrize("step", [1, 2], ids=["replacing", "new"])
def test_f02_a_full_disk_at_any_operation(
    fast_dir: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, operation: str, step: int
) -> None:
    save(fast_dir, 1)
    errors: list[CheckpointError] = []
    for moment in range(1, 50):
        failing = Failing(getattr(owner, operation), moment)
        with monkeypatch.context() as patch:
            # As a function, so that it binds to its object where it replaces a method.
            patch.setattr(owner, operation, lambda *arguments, failing=failing: failing(*arguments))
            try:
                save(fast_dir, step)
            except CheckpointError as error:
                errors.append(error)
        assert not [name for name in names(fast_dir) if ".tmp-" in name]
        assert "step-00000001" in names(fast_dir)
        for name in names(fast_dir):
            verify_checkpoint(fast_dir / name)
        if failing.left > 0:
            break  # a save has fewer operations of this kind
    assert len(errors) >= (6 if operation in ("fsync", "write") else 1)
    assert {type(error.__cause__) for error in errors} == {OSError}
    assert all("could not be written ([Errno 28] No space left" in str(error) for error in errors)
    assert names(fast_dir) == ["step-00000001", "step-00000002"][:step]


def test_f02_an_interruption_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(file: DurableFile, data: bytes) -> None:
        raise KeyboardInterrupt("pressed")

    save(tmp_path, 1)
    monkeypatch.setattr(DurableFile, "write", interrupted)
    with pytest.raises(KeyboardInterrupt, match="pressed"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


# ---------------------------------------------------------------------- F03, F07 missing pieces


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "one byte", "half", "one byte less", "one byte more", "zeros"])
def test_f03_a_file_cut_short_or_gone_is_one_typed_error_and_the_previous_one_is_found(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    data = (bad / name).read_bytes()
    (bad / name).unlink()
    if damage != "missing":
        cut = {"empty": 0, "one byte": 1, "half": len(data) // 2, "one byte less": len(data) - 1}
        new = data + b"\n" if damage == "one byte more" else bytes(len(data)) if damage == "zeros" else None
        (bad / name).write_bytes(data[: cut[damage]] if new is None else new)
    for call in (verify_checkpoint, read_checkpoint):
        with pytest.raises(
            CheckpointError, match=rf"checkpoint {bad} (lacks|has|is corrupt).*{name.split('.')[0]}|mani"
        ):
            call(bad)
    assert newest_checkpoint(tmp_path) == good
    assert f"passed over: checkpoint {bad}" in caplog.text


def test_f03_torch_load_has_a_different_error_for_each(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"w": torch.ones(1000)}, path)
    data = path.read_bytes()
    kinds = set()
    for part in (b"", data[: len(data) // 2], b"junk" * 100):
        path.write_bytes(part)
        try:
            torch.load(path, weights_only=True)
        except Exception as error:  # noqa: BLE001 - which types they are is the question
            kinds.add(type(error).__name__)
    assert len(kinds) == 3


def test_f07_a_directory_without_a_manifest_is_never_the_newest(tmp_path: Path) -> None:
    good = save(tmp_path, 1)
    shutil.copytree(good, tmp_path / "step-00000009")
    (tmp_path / "step-00000009" / MANIFEST_FILE).unlink()
    (tmp_path / "step-00000010").mkdir()
    (tmp_path / "step-00000011").write_text("a file")
    assert newest_checkpoint(tmp_path) == good


# --------------------------------------------------------------------------------- F04 bit flips


def flip_bits(path: Path, count: int, seed: int) -> int:
    """How many of `count` flips of one random bit, each alone, verification notices."""
    draw = random.Random(seed)
    noticed = 0
    for _ in range(count):
        file = path / draw.choice(FILES)
        good = file.read_bytes()
        bad = bytearray(good)
        position = draw.randrange(len(good) * 8)
        bad[position // 8] ^= 1 << position % 8
        file.write_bytes(bad)
        try:
            verify_checkpoint(path)
        except CheckpointError:
            noticed += 1
        file.write_bytes(good)
    verify_checkpoint(path)
    return noticed


def test_f04_three_hundred_bit_flips_are_all_noticed(fast_dir: Path) -> None:
    assert flip_bits(save(fast_dir, 1), 300, seed=1) == 300


def test_f04_reading_verifies_by_itself(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 0x40
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is corrupt: model\.safetensors has SHA-256"):
        read_checkpoint(path)


@pytest.mark.parametrize("mmap", [False, True])
def test_f04_torch_load_does_not_notice_a_flipped_bit(tmp_path: Path, mmap: bool) -> None:
    path = tmp_path / "model.pt"
    weight = torch.arange(10_000, dtype=torch.float32)
    torch.save({"w": weight}, path)
    data = bytearray(path.read_bytes())
    data[data.index(weight[5000:5004].numpy().tobytes()) + 2] ^= 0x40
    path.write_bytes(data)
    loaded = torch.load(path, weights_only=True, mmap=mmap)["w"]
    assert (loaded != weight).nonzero().tolist() == [[5000]]


# ------------------------------------------------------------------------- F05 malice, F15 bombs


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", ["model.pt", "data.pkl", "model.safetensors", "state.json", MANIFEST_FILE])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_f05_a_pickle_in_the_directory_is_never_executed(tmp_path: Path, name: str, form: str) -> None:
    path, marker = save(tmp_path / "root", 1), tmp_path / "executed"
    if form == "pickle":
        (path / name).write_bytes(pickle.dumps(Payload(marker)))
    else:
        torch.save({"w": Payload(marker)}, path / name)
    if name in FILES:
        if name != MANIFEST_FILE:
            resign(path)
        with pytest.raises(CheckpointError, match=r"has files that are not valid|has a corrupt manifest"):
            read_checkpoint(path)
    else:
        assert read_checkpoint(path).step == 1
    newest_checkpoint(tmp_path / "root")
    assert not marker.exists()


def test_f05_torch_load_executes_it_when_told_to_trust(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    torch.save({"w": Payload(marker)}, tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert marker.exists()


def header(text: str | bytes, length: int | None = None) -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return (len(data) if length is None else length).to_bytes(8, "little") + data


@pytest.mark.parametrize(
    "data",
    [
        header("{}", length=1 << 60),
        header("{}", length=1 << 62) + bytes(100),
        header('{"w": {"dtype": "F32", "shape": [1125899906842624], "data_offsets": [0, 4503599627370496]}}'),
        header('{"w": {"dtype": "F32", "shape": [4, 4611686018427387904], "data_offsets": [0, 0]}}'),
        header('{"w": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}') + bytes(12),
        header('{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}') + bytes(4),
        header('{"w": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]}}') + bytes(8),
        header('{"__metadata__": {"v": "none"}}'),
        header(b"[" * 50_000),
        header(b"\xff\xfe"),
        b"",
    ],
    ids=["2^60", "2^62", "huge", "overflow", "hole", "short", "dtype", "alias of nothing", "deep", "not text", "empty"],
)
def test_f15_a_hostile_tensor_file_is_refused_though_its_digest_is_right(tmp_path: Path, data: bytes) -> None:
    path = save(tmp_path, 1)
    (path / "model.safetensors").write_bytes(data)
    resign(path)
    verify_checkpoint(path)
    with pytest.raises(CheckpointError, match="has files that are not valid"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b"{", b"3", b"\xff", b'{"$tuple": 3}', b'{"a": {"$dict": [[[], 1]]}}']
)
def test_f15_a_hostile_state_file_is_refused_though_its_digest_is_right(tmp_path: Path, data: bytes) -> None:
    path = save(tmp_path, 1)
    (path / "state.json").write_bytes(data)
    resign(path)
    with pytest.raises(CheckpointError, match="has files that are not valid"):
        read_checkpoint(path)


# --------------------------------------------------------------- F06 random state, F08, F09 views


def test_f06_torch_load_refuses_the_random_state_that_torch_save_stored(tmp_path: Path) -> None:
    torch.save({"numpy": np.random.get_state()}, tmp_path / "rng.pt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "rng.pt")


def test_f08_the_only_good_one_outlives_any_number_of_failed_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", Failing(os.fsync, 4))
    for step in range(2, 8):
        monkeypatch.setattr(os.fsync, "left", 4)
        with pytest.raises(CheckpointError, match="could not be written"):
            save(tmp_path, step)
    assert newest_checkpoint(tmp_path) == good
    assert names(tmp_path) == ["step-00000001"]


def test_f09_a_view_of_a_large_buffer_costs_its_own_bytes(tmp_path: Path) -> None:
    part = torch.zeros(1_000_000)[:10]
    torch.save({"w": part}, tmp_path / "model.pt")
    path = write_checkpoint(tmp_path, Snapshot(step=1, tensors={"model": {"w": part}}, state={}))
    assert (tmp_path / "model.pt").stat().st_size > 4_000_000
    assert (path / "model.safetensors").stat().st_size < 200


def test_f11_two_of_the_same_shape_do_not_swap_when_their_order_changes(tmp_path: Path) -> None:
    moments = {"first.weight": torch.full((3,), 0.1), "second.weight": torch.full((3,), 10.0)}
    path = write_checkpoint(tmp_path, Snapshot(step=1, tensors={"optimizer": moments}, state={}))
    found = read_checkpoint(path).tensors["optimizer"]
    for name in sorted(moments, reverse=True):
        assert torch.equal(found[name], moments[name])
