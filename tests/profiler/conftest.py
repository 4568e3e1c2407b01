"""A small language model with batches, and its report."""

import pytest
import torch
from torch import nn

from deepseek_mp import PrecisionProfiler


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(32, 64)
        self.up = nn.Linear(64, 128)
        self.norm = nn.LayerNorm(128)
        self.down = nn.Linear(128, 64)
        self.head = nn.Linear(64, 32, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.2)
        self.unused = nn.Linear(4, 4)

    def forward(self, tokens):
        return self.head(self.down(torch.relu(self.norm(self.up(self.embedding(tokens))))))


@pytest.fixture
def model():
    torch.manual_seed(1)
    return Small()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(2)
    return [(x := torch.randint(0, 32, (8, 16), generator=generator), x.roll(-1, 1)) for _ in range(6)]


@pytest.fixture
def report(model, batches):
    return PrecisionProfiler(model).analyze(batches, max_batches=4, time_layers=False)
