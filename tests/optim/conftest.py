"""What the tests of `optim` share: a small network and a loop."""

import pytest
import torch
from torch import nn


@pytest.fixture
def net():
    """The same network each time it is called."""

    def make(dtype=torch.float32):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 4)).to(dtype)

    return make


@pytest.fixture
def train():
    """The same batches each time it is called; `start` continues where a shorter call ended."""

    def run(model, optimizer, steps=30, *, start=0, scheduler=None):
        for step in range(start, start + steps):
            torch.manual_seed(step)
            x = torch.randn(32, 16)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=any(p.element_size() == 2 for p in model.parameters())):
                loss = (model(x).float() - x[:, :4]).square().mean()
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()

    return run
