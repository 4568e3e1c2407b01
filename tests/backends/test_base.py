"""What a backend that overrides nothing answers."""

from __future__ import annotations

import pytest
import torch

from deepseek_mp.backends import Backend, Identity

DEVICE = torch.device("meta")


class Plain(Backend):
    """A backend with the two answers that every backend must give."""

    name, vendor, device_type = "plain", "someone", "meta"

    def __init__(self, available: bool = True) -> None:
        self.available = available

    def is_available(self) -> bool:
        return self.available

    def identify(self, device: torch.device) -> Identity:
        return Identity(row=None, device_name="plain device")


def test_the_two_questions_without_a_default_must_be_answered() -> None:
    with pytest.raises(TypeError, match="abstract method"):
        Backend()  # type: ignore[abstract]


def test_defaults_are_those_of_a_device_without_hidden_flags() -> None:
    backend = Plain()
    with backend.fp32_math("ieee"), backend.algorithm_search(True):
        assert backend.fp32_mode("conv") == "ieee"
    assert backend.energy_joules(DEVICE) is None
    backend.clear_overflow(DEVICE)
    assert backend.overflow_seen(DEVICE) is None
    assert backend.capabilities(DEVICE).recommended.reason == "unknown device"


def test_autocast_runs_16_bit_formats_on_a_device_that_is_there() -> None:
    assert Plain().autocast_formats(DEVICE) == {"bf16", "fp16"}
    assert Plain(available=False).autocast_formats(DEVICE) == set()


def test_memory_and_waiting_go_through_pytorchs_portable_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: calls.append("synchronize"))
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 123)
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch.accelerator, "max_memory_reserved", lambda device: 456)
    backend = Plain()
    backend.synchronize(DEVICE)
    assert backend.peak_memory_bytes(DEVICE) == 123
    assert backend.peak_reserved_bytes(DEVICE) == 456
    assert backend.reset_peak_memory(DEVICE) is True
    assert calls == ["synchronize", "reset"]
