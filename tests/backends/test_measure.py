"""The measuring functions ask the device's own backend, by device or by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deepseek_mp.backends import measure
from deepseek_mp.backends.detect import BUILT_IN

CPU_BACKEND = next(backend for backend in BUILT_IN if backend.name == "cpu")


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
@pytest.mark.parametrize(
    ("function", "question"),
    [
        (measure.synchronize, "synchronize"),
        (measure.peak_memory_bytes, "peak_memory_bytes"),
        (measure.peak_reserved_bytes, "peak_reserved_bytes"),
        (measure.reset_peak_memory, "reset_peak_memory"),
        (measure.available_memory_bytes, "available_memory_bytes"),
        (measure.energy_joules, "energy_joules"),
        (measure.clear_overflow, "clear_overflow"),
        (measure.overflow_seen, "overflow_seen"),
    ],
)
def test_each_function_asks_the_devices_backend(
    monkeypatch: pytest.MonkeyPatch, device: Any, function: Any, question: str
) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(CPU_BACKEND, question, asked.append)
    function(device)
    assert asked == [torch.device("cpu")]


def test_an_accelerator_counts_how_often_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure.out_of_memory_count("cpu") is None
    monkeypatch.setattr(torch.accelerator, "memory_stats", lambda device: {"num_ooms": 2} if device.index == 1 else {})
    assert measure.out_of_memory_count("cuda:1") == 2
    assert measure.out_of_memory_count("cuda:0") is None
    monkeypatch.delattr(torch.accelerator, "memory_stats")
    assert measure.out_of_memory_count("cuda:1") is None


def test_a_cpu_overflows_to_infinities_and_has_no_energy_counter() -> None:
    measure.clear_overflow("cpu")
    assert measure.overflow_seen("cpu") is None
    assert measure.energy_joules("cpu") is None
