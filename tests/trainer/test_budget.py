"""A budget for what an eager model keeps: blocks are computed again, and nothing else is different."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.nn.delayed import scales_of

LEAST = 0.01
"""Out of reach: every block is taken."""
INPUTS = torch.randn(12, 8, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(5, (12, 8), generator=torch.Generator().manual_seed(2))


class Block(nn.Module):
    def __init__(self, width: int, drop: float = 0.2) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        hidden = self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return x + self.drop(self.down(nn.functional.gelu(self.up(hidden))))


class Net(nn.Module):
    def __init__(self, drop: float = 0.2, *, tied: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(32, drop) for _ in range(4)])
        self.head = nn.Linear(32, 5)
        if tied:
            self.blocks[2].up.weight = self.blocks[0].up.weight

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_fn(output, target):
    return nn.functional.cross_entropy(output.flatten(0, 1).float(), target.flatten())


def make(mode="fp32", *, model=None, tied=False, **options):
    torch.manual_seed(0)
    model = Net(tied=tied) if model is None else model
    options = {"loss_fn": loss_fn, "seed": 0, "device": "cpu", "emulate": True, "progress": False} | options
    return MixedPrecisionTrainer(model, mode, **options)


def batches(count=6):
    return [(INPUTS[2 * i : 2 * i + 2], LABELS[2 * i : 2 * i + 2]) for i in range(count)]


def trained(mode="fp32", steps=4, **options):
    trainer = make(mode, **options)
    for batch in batches(steps):
        trainer.step(batch)
    trainer.settle()
    return trainer


def assert_same(one, other):
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16", "delayed", "row"])
def test_training_is_the_same_bit_for_bit(mode):
    plain, budgeted = trained(mode), trained(mode, activation_memory_budget=LEAST)
    assert len(budgeted.recomputed_blocks.recomputed) == 4
    assert_same(plain, budgeted)
    assert torch.equal(torch.get_rng_state(), _rng_after(mode))
    for ours, theirs in zip(scales_of(plain.model), scales_of(budgeted.model), strict=True):
        assert torch.equal(ours.history, theirs.history)


def _rng_after(mode):
    trained(mode)
    return torch.get_rng_state()


@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {"tied": True}, {"ema_decay": 0.9}])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "delayed"])
def test_training_is_the_same_with(options, mode):
    assert_same(trained(mode, **options), trained(mode, **options, activation_memory_budget=LEAST))
