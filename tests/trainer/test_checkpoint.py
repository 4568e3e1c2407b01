"""A snapshot comes back as it was; a checkpoint can be found, replaced, and kept in number."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from deepseek_mp.errors import CheckpointError, ConfigError
from deepseek_mp.trainer import checkpoint as module
from deepseek_mp.trainer.checkpoint import (
    Snapshot,
    newest_checkpoint,
    read_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from deepseek_mp.trainer.rng import rng_state, set_rng_state


def snapshot(number: int, **changes: Any) -> Snapshot:
    tensors = {"model": {"w": torch.full((4, 4), float(number)), "b": torch.arange(4)}, "optimizer": {}}
    state = {"step": number, "best": float("inf")}
    return Snapshot(**{"step": number, "tensors": tensors, "state": state} | changes)


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_snapshot_comes_back(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, snapshot(42))
    assert path == tmp_path / "step-00000042"
    found = read_checkpoint(path)
    assert (found.step, found.state) == (42, {"step": 42, "best": float("inf")})
    assert found.tensors.keys() == {"model", "optimizer"}
    assert torch.equal(found.tensors["model"]["w"], torch.full((4, 4), 42.0))
    assert torch.equal(found.tensors["model"]["b"], torch.arange(4))
    assert found.tensors["optimizer"] == {}


def test_the_directory_is_as_documented(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, snapshot(3))
    assert names(path) == ["MANIFEST.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert manifest["version"] == 1
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {
        name: (path / name).stat().st_size for name in names(path) if name != "MANIFEST.json"
    }


def test_tensors_are_keyed_by_name_in_whatever_order(tmp_path: Path) -> None:
    one, two = torch.ones(3), torch.zeros(3)
    forth = write_checkpoint(tmp_path, snapshot(1, tensors={"optimizer": {"a": one, "b": two}}))
    back = write_checkpoint(tmp_path, snapshot(2, tensors={"optimizer": {"b": two, "a": one}}))
    for path in (forth, back):
        found = read_checkpoint(path).tensors["optimizer"]
        assert torch.equal(found["a"], one)
        assert torch.equal(found["b"], two)


def test_the_random_state_travels_in_a_checkpoint(tmp_path: Path) -> None:
    tensors, values = rng_state()
    path = write_checkpoint(tmp_path, snapshot(1, tensors={"rng": tensors}, state={"rng": values}))
    expected = torch.rand(3)
    found = read_checkpoint(path)
    set_rng_state(found.tensors["rng"], found.state["rng"])
    assert torch.equal(torch.rand(3), expected)


def test_weights_load_into_the_plain_model_without_this_package(tmp_path: Path) -> None:
    trained, plain = nn.Linear(3, 2), nn.Linear(3, 2)
    path = write_checkpoint(tmp_path, snapshot(1, tensors={"model": trained.state_dict()}))
    safetensors.torch.load_model(plain, path / "model.safetensors")
    assert torch.equal(plain.weight, trained.weight)


def test_a_later_change_of_the_tensors_is_not_in_the_checkpoint(tmp_path: Path) -> None:
    weight = torch.ones(4)
    path = write_checkpoint(tmp_path, snapshot(1, tensors={"model": {"w": weight}}))
    weight.zero_()
    assert torch.equal(read_checkpoint(path).tensors["model"]["w"], torch.ones(4))


def test_the_newest_is_found_from_any_of_three_places(tmp_path: Path) -> None:
    root = tmp_path / "run" / "checkpoints"
    for step in (9, 10, 11):
        path = write_checkpoint(root, snapshot(step))
    assert newest_checkpoint(tmp_path / "run") == path
    assert newest_checkpoint(root) == path
    assert newest_checkpoint(root / "step-00000009") == root / "step-00000009"
    renamed = path.rename(tmp_path / "best")
    assert newest_checkpoint(renamed) == renamed
    assert newest_checkpoint(root) == root / "step-00000010"


def test_the_newest_is_the_one_written_last_also_after_going_back(tmp_path: Path) -> None:
    for step in (50, 100, 60):  # resumed from 50 by name
        path = write_checkpoint(tmp_path, snapshot(step))
    assert newest_checkpoint(tmp_path) == path


def test_steps_of_nine_digits_are_found(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, snapshot(123_456_789))
    assert newest_checkpoint(tmp_path) == path


@pytest.mark.parametrize("place", ["none", "empty", "step-00000001"])
def test_no_checkpoint_at_all(tmp_path: Path, place: str) -> None:
    (tmp_path / "empty").mkdir()
    assert newest_checkpoint(tmp_path / place) is None


def test_the_same_step_is_replaced_as_a_whole(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, snapshot(1, tensors={"old": {"x": torch.ones(1)}}))
    path = write_checkpoint(tmp_path, snapshot(1, state={"new": True}))
    assert names(tmp_path) == ["step-00000001"]
    assert read_checkpoint(path).state == {"new": True}
    assert "old" not in read_checkpoint(path).tensors


@pytest.mark.parametrize(("keep", "left"), [(1, [6]), (3, [4, 5, 6]), (None, [1, 2, 3, 4, 5, 6])])
def test_as_many_are_kept_as_asked(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    for step in range(1, 7):
        write_checkpoint(tmp_path, snapshot(step), keep=keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in left]


def test_the_one_just_written_is_kept_also_when_its_step_is_lower(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        write_checkpoint(tmp_path, snapshot(step), keep=2)
    path = write_checkpoint(tmp_path, snapshot(50), keep=2)
    assert names(tmp_path) == ["step-00000050", "step-00000300"]
    assert newest_checkpoint(tmp_path) == path


def test_replacing_a_step_does_not_cost_another(tmp_path: Path) -> None:
    for step in (1, 2, 2, 2):
        write_checkpoint(tmp_path, snapshot(step), keep=2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_each_checkpoint_passed_over_is_logged_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, flipped, unfinished = (write_checkpoint(tmp_path, snapshot(step)) for step in (1, 2, 3))
    data = bytearray((flipped / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (flipped / "model.safetensors").write_bytes(data)
    (unfinished / "MANIFEST.json").unlink()
    assert newest_checkpoint(tmp_path) == good
    assert f"passed over: checkpoint {flipped} is corrupt: model.safetensors has SHA-256" in caplog.text
    assert f"passed over: checkpoint {unfinished} has no MANIFEST.json, so it was not finished" in caplog.text


def test_files_that_do_not_belong_are_reported_and_harmless(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_checkpoint(tmp_path, snapshot(1))
    (path / "notes.txt").write_text("a good one")
    verify_checkpoint(path)
    assert "not read: notes.txt" in caplog.text
    assert read_checkpoint(path).step == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": {"scheduler": {"fn": print}}}, r"state\.scheduler\.fn is a builtins\.builtin_function"),
        ({"tensors": {"model": {"w": torch.empty(1, device="meta")}}}, r"model\['w'\] has a shape at most"),
        ({"tensors": {"../model": {}}}, r"tensor file '\.\./model'"),
        ({"tensors": {"": {}}}, "tensor file ''"),
        ({"step": -1}, "step -1"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(tmp_path / "root", snapshot(1, **change))
    assert names(tmp_path) == []


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keep=0.*1 and more"):
        write_checkpoint(tmp_path, snapshot(1), keep=0)


def test_one_error_for_a_path_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        read_checkpoint(tmp_path / "none")


def test_reading_onto_a_device(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, snapshot(1))
    assert read_checkpoint(path, device="meta").tensors["model"]["w"].is_meta


def test_relative_paths_and_text_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_checkpoint("runs/a", snapshot(1))
    assert read_checkpoint(os.fspath(path)).step == 1
    assert newest_checkpoint("runs/a") == path


def test_threads_write_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish, others = module.publish, []

    with ThreadPoolExecutor(1) as pool:

        def publishing(partial: Path, final: Path) -> None:
            if not others:
                others.append(pool.submit(write_checkpoint, tmp_path, snapshot(2)))
                wait(others, timeout=0.5)  # one that does not wait its turn clears what is not yet published
            publish(partial, final)

        monkeypatch.setattr(module, "publish", publishing)
        write_checkpoint(tmp_path, snapshot(1))
        assert others[0].result() == tmp_path / "step-00000002"
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
