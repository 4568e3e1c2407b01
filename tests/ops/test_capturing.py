"""Whether a device's work is being recorded, on devices that can say so and on others."""

from __future__ import annotations

import pytest
import torch

from deepseek_mp.ops.capturing import is_capturing


def test_a_device_that_can_record_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Device:
        captures = True

        @classmethod
        def is_current_stream_capturing(cls) -> bool:
            return cls.captures

    monkeypatch.setattr(torch, "get_device_module", lambda device: Device)
    assert is_capturing(torch.device("cuda"))
    Device.captures = False
    assert not is_capturing(torch.device("cuda"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: object)  # Apple GPUs have none
    assert not is_capturing(torch.device("mps"))


@pytest.mark.parametrize("kind", ["cpu", "meta"])
def test_others_are_not(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(torch, "get_device_module", lambda device: pytest.fail("asked"))
    assert not is_capturing(torch.device(kind))
