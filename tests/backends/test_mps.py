"""Apple GPUs: BF16 by macOS and chip, no peak memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from deepseek_mp.backends import (
    available_memory_bytes,
    capabilities,
    peak_memory_bytes,
    peak_reserved_bytes,
    reset_peak_memory,
)
from deepseek_mp.backends.mps import MpsBackend

Install = Callable[..., None]
MPS = torch.device("mps")


@pytest.mark.parametrize(
    ("macos", "machine", "bf16"), [(14, "arm64", True), (13, "arm64", False), (15, "x86_64", False)]
)
def test_bf16_needs_macos_14_and_apple_silicon(apple: Install, macos: int, machine: str, bf16: bool) -> None:
    apple(macos=macos, machine=machine)
    found = capabilities("mps")
    assert ("bf16" in found.matmul_formats) == bf16
    assert ("bf16" in MpsBackend().autocast_formats(MPS)) == bf16
    assert found.device_name == "Apple M2"
    assert str(found.recommended) == "FP16+FP32"
    assert "fp64" not in found.matmul_formats


def test_memory_has_no_peak(apple: Install) -> None:
    apple()
    assert peak_memory_bytes("mps") is None
    assert peak_reserved_bytes("mps") is None
    assert available_memory_bytes("mps") is None
    assert reset_peak_memory("mps") is False


def test_autocast_runs_nothing_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert MpsBackend().autocast_formats(MPS) == set()
