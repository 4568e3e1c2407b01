"""What tests of quantisation share: a small network with all kinds of layers, prepared once."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from deepseek_mp.qat import SimulatedModel, prepare

EXAMPLE = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(3))


class Net(nn.Module):
    """Conv2d with and without bias, Conv1d and Linear, BatchNorms of unusual settings, dropout, LayerNorm."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8, eps=0.1, momentum=0.3), nn.ReLU()
        )
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.row, self.row_norm = nn.Conv1d(8, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.layer_norm, self.drop = nn.LayerNorm(8), nn.Dropout(0.5)
        self.hidden, self.last = nn.Linear(8, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(self.stem(x))))
        x = torch.relu(self.row_norm(self.row(x.flatten(2)))).mean(2)
        return self.last(self.drop(torch.relu(self.hidden(self.layer_norm(x)))))


@pytest.fixture(scope="session")
def prepared_once() -> tuple[Net, SimulatedModel]:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for norm in (model.stem[1], model.norm, model.row_norm):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.05, 2)
    return model, prepare(model, EXAMPLE, keep=["last"])


@pytest.fixture
def model(prepared_once) -> Net:
    return deepcopy(prepared_once[0])


@pytest.fixture
def simulated(prepared_once) -> SimulatedModel:
    return deepcopy(prepared_once[1])


@pytest.fixture
def example() -> torch.Tensor:
    return EXAMPLE.clone()
