"""Restored generators draw the same numbers again, bit by bit, from types that are safe to load."""

from __future__ import annotations

import json
import random
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deepseek_mp.errors import CheckpointError
from deepseek_mp.trainer.rng import get_rng, rng_state, set_rng, set_rng_state


def draw() -> tuple[object, ...]:
    python = [random.random(), random.gauss(0, 1), random.getrandbits(100), random.sample(range(100), 5)]
    return (*python, np.random.rand(3).tolist(), np.random.randn(), torch.rand(5).tolist(), torch.randperm(9).tolist())


@pytest.mark.parametrize("odd", [False, True], ids=["fresh", "with a cached gaussian"])
def test_all_generators_continue_bit_by_bit(odd: bool) -> None:
    if odd:
        random.gauss(0, 1)  # each keeps the second gaussian of a pair for the next call
        np.random.randn()
        torch.randn(1)
    tensors, values = rng_state()
    values = json.loads(json.dumps(values))
    expected = draw()
    assert draw() != expected
    set_rng_state(tensors, values)
    assert draw() == expected


def test_the_state_is_tensors_and_json_only() -> None:
    tensors, values = rng_state()
    assert {type(tensor) for tensor in tensors.values()} == {Tensor}
    json.dumps(values, allow_nan=False)


def test_the_state_does_not_change_with_further_draws() -> None:
    tensors, _ = rng_state()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    draw()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())


def test_another_numpy_generator_is_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    original = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        tensors, values = rng_state()
        values = json.loads(json.dumps(values))
        expected = np.random.rand(4)
        set_rng_state(tensors, values)
        assert np.array_equal(np.random.rand(4), expected)
    finally:
        np.random.set_bit_generator(original)


def test_without_numpy(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    tensors, values = rng_state()
    monkeypatch.delitem(sys.modules, "numpy")
    assert "numpy" not in rng_state()[1]
    set_rng_state(tensors, values)
    assert "numpy is not imported" in caplog.text


class FakeDevice:
    """A device module with one generator, as vendors' plug-ins bring it."""

    def __init__(self) -> None:
        self.state = torch.tensor([1, 2, 3], dtype=torch.uint8)
        self.asked: list[str] = []

    def get_rng_state(self, device: str | torch.device = "xpu") -> Tensor:
        self.asked.append(str(device))
        return self.state.clone()

    def set_rng_state(self, new_state: Tensor, device: str | torch.device = "xpu") -> None:
        self.asked.append(str(device))
        self.state = new_state


def test_the_generator_of_the_training_device(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDevice()
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    tensors, values = rng_state("xpu:1")
    fake.state = torch.zeros(3, dtype=torch.uint8)
    set_rng_state(tensors, values, "xpu:1")
    assert fake.state.tolist() == [1, 2, 3]
    assert set(fake.asked) == {"xpu:1"}


def test_device_modules_whose_calls_take_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[Tensor] = []
    fake = SimpleNamespace(get_rng_state=lambda: torch.ones(2, dtype=torch.uint8), set_rng_state=states.append)
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    set_rng_state(*rng_state("mps"), "mps")
    assert states[0].tolist() == [1, 1]


@pytest.mark.parametrize(("saved", "here"), [("xpu", "cpu"), ("cpu", "xpu"), ("xpu", "mps")])
def test_another_kind_of_device_is_reported(
    saved: str, here: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda device: FakeDevice())
    tensors, values = rng_state(saved)
    set_rng_state(tensors, values, here)
    assert f"generator state of a {saved} device cannot be used on {here}" in caplog.text


def test_on_the_cpu_no_accelerator_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(*args: object) -> ModuleType:
        raise AssertionError("an accelerator was asked")

    monkeypatch.setattr(torch, "get_device_module", touched)
    set_rng_state(*rng_state())


def change(tensors: dict[str, Any], values: dict[str, Any], what: str) -> None:
    if what == "no python":
        del values["python"]
    elif what == "short python":
        tensors["python"] = tensors["python"][:100]
    elif what == "short torch":
        tensors["torch"] = tensors["torch"][:100]
    elif what == "no torch":
        del tensors["torch"]
    else:
        values["numpy"]["bit_generator"] = "none such"


@pytest.mark.parametrize("what", ["no python", "short python", "short torch", "no torch", "other numpy"])
def test_a_state_that_is_not_valid_changes_nothing(what: str) -> None:
    tensors, values = rng_state()
    change(tensors, values, what)
    draw()
    before = rng_state()
    with pytest.raises(CheckpointError, match="random generator state cannot be restored"):
        set_rng_state(tensors, values)
    expected = draw()
    set_rng_state(*before)
    assert draw() == expected


def test_the_generators_of_a_forward_are_those_of_the_device_that_was_named(monkeypatch):
    fake = FakeDevice()
    monkeypatch.setattr(torch, "get_device_module", lambda device: fake)
    states = get_rng(torch.device("xpu:1"))
    fake.state = torch.zeros(3, dtype=torch.uint8)
    set_rng(states, torch.device("xpu:1"))
    assert fake.state.tolist() == [1, 2, 3]
    assert set(fake.asked) == {"xpu:1"}
