"""Counting FLOPs: the number is PyTorch's, and no output is computed for its sake."""

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from deepseek_mp.nn.deferred import deferring, is_pending
from deepseek_mp.trainer.flop_count import flop_counter


def test_the_number_is_pytorch_s():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.Conv1d(3, 5, 2)), torch.randn(2, 3, 4)
    counts = []
    for counter in (flop_counter(), FlopCounterMode(display=False)):
        with counter:
            model(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_an_output_that_nobody_reads_is_not_computed():
    layer = nn.Linear(4, 8)
    with flop_counter() as counter, deferring(layer):
        output = layer(torch.randn(2, 4))
    assert is_pending(output)
    assert counter.get_total_flops() == 0
