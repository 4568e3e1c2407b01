"""Whatever is tried on a model, it is afterwards as it was."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from deepseek_mp.costs.restore import preserved

CPU = torch.device("cpu")


class Caching(nn.Module):
    """Replaces a buffer, fills an empty one, adds one, and switches a part to eval, in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("filled", None, persistent=False)
        self.dropout = nn.Dropout()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.replaced = torch.ones(2)
        self.filled = torch.ones(1)
        self.register_buffer("added", torch.ones(1))
        self.dropout.eval()
        return self.norm(x)


def numbers() -> tuple[Any, ...]:
    """The next number of each generator."""
    return random.random(), float(np.random.random()), float(torch.rand(1))


def step(model: nn.Module) -> None:
    model(torch.randn(4, 3)).sum().backward()
    numbers()


@pytest.mark.parametrize("fail", [False, True])
def test_buffers_flags_gradients_and_generators_come_back(*, fail: bool) -> None:
    model = Caching()
    weight = model.norm.weight
    weight.grad = torch.full((3,), 7.0)
    gradient, replaced, mean = weight.grad, model.replaced, model.norm.running_mean
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = numbers()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    try:
        with preserved(model, CPU):
            assert weight.grad is None
            step(model)
            assert weight.grad is not None
            assert mean.abs().sum() > 0
            if fail:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fail
    assert weight.grad is gradient
    assert gradient.tolist() == [7.0] * 3
    assert model.norm.bias.grad is None
    assert model.replaced is replaced
    assert replaced.tolist() == [0.0, 0.0]
    assert model.filled is None
    assert "added" not in dict(model.named_buffers())
    assert model.norm.running_mean is mean
    assert mean.tolist() == [0.0] * 3
    assert int(model.norm.num_batches_tracked) == 0
    assert model.dropout.training
    assert numbers() == expected


def test_an_optimizer_in_a_gradient_hook_does_not_step() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.weight.register_post_accumulate_grad_hook(lambda _: optimizer.step())
    before = model.weight.detach().clone()
    with preserved(model, CPU):
        model(torch.ones(1, 2)).sum().backward()
    assert torch.equal(model.weight, before)
    model(torch.ones(1, 2)).sum().backward()
    assert not torch.equal(model.weight, before), "outside, the hook is back"


def test_a_snapshot_can_be_restored_before_each_trial() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    outputs = []
    with preserved(model, CPU) as snapshot:
        for _ in range(2):
            snapshot.restore()
            outputs.append(model(torch.randn(4, 3)))
            assert int(model[0].num_batches_tracked) == 1
    assert torch.equal(outputs[0], outputs[1])
