"""A block's state before a forward comes back inside, and what it was outside comes back after."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_mp.activations.block_state import Again, BlockState, Writes
from deepseek_mp.nn.again import is_computed_again

CPU = torch.device("cpu")


def test_flags_generators_and_attributes_are_those_of_then():
    block = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    block.steps, block.note = 3, "before"
    state = BlockState(block, CPU, Writes())
    expected = torch.rand(2)
    state.forward_ended()
    block.eval()
    block.steps, block.note, block.found = 4, "after", torch.ones(2)
    outside = torch.get_rng_state()
    for _ in range(2):
        with Again(state):
            assert block.training
            assert (block.steps, block.note) == (3, "before")
            assert torch.equal(torch.rand(2), expected)
            assert is_computed_again()
            block.steps, block.found, block.more = 9, None, 1
    assert (block.training, block.steps, block.note) == (False, 4, "after")
    assert torch.equal(block.found, torch.ones(2))
    assert not hasattr(block, "more")
    assert torch.equal(torch.get_rng_state(), outside)
    assert not is_computed_again()


def test_a_batchnorm_s_statistics_are_not_copied_before_and_not_touched():
    norm = nn.BatchNorm1d(2)
    state = BlockState(norm, CPU, Writes(all_=True))
    norm(torch.randn(4, 2))
    state.forward_ended()
    mean, kept = norm.running_mean, norm.running_mean.clone()
    with Again(state):
        assert norm.running_mean is not mean
        norm(torch.randn(4, 2))
    assert norm.running_mean is mean
    assert torch.equal(mean, kept)
    assert int(norm.num_batches_tracked) == 1


def test_a_buffer_is_put_back_as_an_object():
    block = nn.Module()
    block.register_buffer("table", torch.zeros(2))
    block.register_buffer("none", None)
    table, state = block.table, BlockState(block, CPU, Writes())
    block.table = torch.ones(2)
    state.forward_ended()
    now = block.table
    with Again(state):
        assert torch.equal(block.table, torch.zeros(2))
        assert block.table is not table
        block.table.add_(5)
        block.register_buffer("new", torch.ones(1))
    assert block.table is now
    assert torch.equal(table, torch.zeros(2))
    assert "new" not in dict(block.named_buffers())


def test_a_buffer_nobody_writes_is_the_same_object_inside():
    block = nn.Module()
    block.register_buffer("table", torch.zeros(2))
    table, state = block.table, BlockState(block, CPU, Writes())
    state.forward_ended()
    with Again(state):
        assert block.table is table


def test_an_error_while_it_is_put_in_place_leaves_everything_as_it_was():
    block = nn.Module()
    block.register_buffer("table", torch.zeros(2))
    block.steps = 1
    writes = Writes()
    state = BlockState(block, CPU, writes)
    block.steps = 2
    block.table.add_(1)
    state.forward_ended()
    assert (block, "table") in writes.places
    with pytest.raises(ValueError, match="wrote the buffer 'table'"), Again(state):
        pass
    assert block.steps == 2
    assert not is_computed_again()
