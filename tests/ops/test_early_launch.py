"""Kernels are launched early inside `early_launches` alone, and only on devices that do so."""

from __future__ import annotations

import threading

import pytest
import torch

from deepseek_mp.ops import early_launch
from deepseek_mp.ops.early_launch import early, early_launches, is_unwritten, unwritten

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
LATE, EARLY = {"EARLY": False}, {"EARLY": True, "launch_pdl": True}


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    monkeypatch.setattr(early_launch, "can_launch_early", lambda device: device == CUDA)


def test_only_inside():
    assert early() == LATE
    with early_launches(CUDA):
        assert early() == EARLY
        with early_launches(CPU):
            assert early() == LATE
        assert early() == EARLY
    assert early() == LATE


def test_left_after_a_failure():
    with pytest.raises(RuntimeError, match="inside"), early_launches(CUDA):
        raise RuntimeError("inside")
    assert early() == LATE


def test_other_threads_are_not_inside():
    seen = []
    with early_launches(CUDA):
        thread = threading.Thread(target=lambda: seen.append(early()))
        thread.start()
        thread.join()
    assert seen == [LATE]


def test_only_memories_that_are_named_and_only_inside():
    weights, other = [torch.zeros(4, 8), torch.zeros(3)], torch.zeros(4, 8)
    with unwritten(weights):
        assert is_unwritten(weights[0])
        assert is_unwritten(weights[0].view(torch.int32)[2:])
        assert not is_unwritten(other)
        assert not is_unwritten(torch.cat(weights[:1])), "a copy that the call makes"
        with unwritten([other]):
            assert not is_unwritten(weights[0])
    assert not is_unwritten(weights[0])
    with pytest.raises(RuntimeError, match="inside"), unwritten(weights):
        raise RuntimeError("inside")
    assert not is_unwritten(weights[0])
