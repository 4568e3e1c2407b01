"""Blocks that are computed again on a GPU: the same bits, less memory, and no waiting once they are chosen."""

from __future__ import annotations

import pytest
import torch
from no_waiting import no_waiting
from torch import nn

from deepseek_mp import MixedPrecisionTrainer

pytestmark = pytest.mark.gpu
ROWS, WIDTH = 2048, 512


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm(x)))))


def make(mode, budget):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(*(Block() for _ in range(4))), nn.Linear(WIDTH, 8))
    return MixedPrecisionTrainer(
        model, mode, seed=0, device="cuda", progress=False, activation_memory_budget=budget, statistics_every=None
    )


def batches(count):
    draw = torch.Generator("cuda").manual_seed(1)
    return [
        (
            torch.randn(ROWS, WIDTH, device="cuda", generator=draw),
            torch.randint(8, (ROWS,), device="cuda", generator=draw),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16", "fp8"])
def test_training_is_the_same_bit_for_bit(mode):
    if mode == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 units")
    trainers = [make(mode, budget) for budget in (None, 0.01)]
    for trainer in trainers:
        torch.manual_seed(2)
        for batch in batches(4):
            trainer.step(batch)
        trainer.settle()
    assert len(trainers[1].recomputed_blocks.recomputed) == 4
    plain, budgeted = (trainer.model.state_dict() for trainer in trainers)
    for name, value in plain.items():
        assert torch.equal(value, budgeted[name]), name


def test_less_is_kept():
    kept = []
    for budget in (None, 0.01):
        trainer = make("bf16", budget)
        for batch in batches(3):
            trainer.step(batch)
        trainer.settle()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        trainer.step(batches(1)[0])
        trainer.settle()
        kept.append(torch.cuda.max_memory_allocated() - before)
    assert kept[1] < 0.7 * kept[0]


def test_nothing_waits_once_the_blocks_are_chosen():
    trainer, data = make("bf16", 0.01), batches(6)
    for batch in data[:3]:
        trainer.step(batch)
    trainer.settle()
    with no_waiting():
        trainer.step(data[3])
