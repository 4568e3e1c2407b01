"""FLOPs of a step are the model's: what is computed again is not counted."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deepseek_mp.nn.again import computed_again
from deepseek_mp.nn.deferred import deferring, is_pending
from deepseek_mp.ops.max_pool import max_pool2d
from deepseek_mp.trainer.step_flops import StepFlops


def test_what_is_computed_again_does_not_count():
    a, b = torch.ones(2, 3), torch.ones(3, 4)
    with StepFlops() as flops:
        a @ b
        with computed_again():
            again = a @ b
    assert flops.get_total_flops() == 2 * 2 * 3 * 4
    assert torch.equal(again, a @ b)


def test_the_number_is_pytorch_s():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Conv1d(3, 5, 2)), torch.randn(2, 3, 4)
    counts = []
    for counter in (StepFlops(), FlopCounterMode(display=False)):
        with counter:
            model(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_an_output_that_nobody_reads_is_not_computed():
    layer = nn.Linear(4, 8)
    with StepFlops() as counter, deferring(layer):
        output = layer(torch.randn(2, 4))
    assert is_pending(output)
    assert counter.get_total_flops() == 0


def test_max_pools_count_nothing_like_pytorch_s():
    x = torch.randn(2, 8, 6, 6)
    with StepFlops() as counter:
        nn.MaxPool2d(2)(x)
        max_pool2d(x, (2, 2), (2, 2), (0, 0), False, implementation="reference")
    assert counter.get_total_flops() == 0
