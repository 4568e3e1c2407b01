"""Models that the tests of inference serve."""

import pytest
import torch
from torch import nn


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
