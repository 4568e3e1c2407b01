"""Models that the tests of inference serve, and a recorder for them."""

import pytest
import torch
from torch import nn

from deepseek_mp.inference import graphed


@pytest.fixture
def classifier():
    """[N, 3, 8, 8] to [N, 5], with BatchNorms that have seen data, in training mode."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    for _ in range(3):
        model(torch.randn(16, 3, 8, 8) * 2 + 1)
    return model


class Recorder:
    """Replays by calling again."""

    bytes = 0

    def __init__(self, device):
        self.device = device

    def warm(self, call):
        call()

    def record(self, call):
        outputs = call()
        return (lambda: outputs.copy_(call())), outputs


@pytest.fixture
def recording(monkeypatch):
    """Calls of one tensor of outputs count as recorded on a CPU."""
    monkeypatch.setattr(graphed, "records", lambda device: True)
    monkeypatch.setattr(graphed, "DeviceRecorder", Recorder)
