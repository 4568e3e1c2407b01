"""Which devices launch kernels early: NVIDIA's from sm_90 on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from deepseek_mp.backends.early_launch import can_launch_early

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Answers about devices that are not there."""
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    can_launch_early.cache_clear()
    yield
    can_launch_early.cache_clear()


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 3), True), ((12, 0), True)]
)
def test_the_capability_decides(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert can_launch_early(CUDA) is expected


def test_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not can_launch_early(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not can_launch_early(CUDA)


def test_without_the_device_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not can_launch_early(CUDA)
