"""Blocks that are computed again: gradients, buffers, random numbers and attributes are those of one run."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from deepseek_mp.activations.block_state import Writes
from deepseek_mp.activations.checkpointed import apart, recomputed_blocks, together
from deepseek_mp.nn.again import is_computed_again

CPU = torch.device("cpu")


class Rows(nn.Module):
    """Runs blocks one after the other, with whatever arguments they take."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x, *args, **kwargs):
        for block in self.blocks:
            x = block(x, *args, **kwargs)
        return x


def gradients(model, again, x, *args, writes=None, steps=1, **kwargs):
    """Output, gradients of input and parameters, state and random states after some forwards and backwards."""
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    writes = Writes() if writes is None else writes
    x = x.clone().requires_grad_()
    for _ in range(steps):
        with recomputed_blocks(model.blocks if again else (), CPU, writes):
            output = model(x, *args, **kwargs)
        output.square().sum().backward()
    draws = torch.rand(3), torch.tensor(random.random()), torch.tensor(np.random.rand())
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"y": output, "dx": x.grad, **grads, **model.state_dict(), **dict(zip("abc", draws, strict=True))}


def assert_same(make, x, *args, writes=None, steps=1, **kwargs):
    torch.manual_seed(1)
    model = make()
    torch.manual_seed(1)
    other = make()
    plain = gradients(model, False, x, *args, steps=steps, **kwargs)
    again = gradients(other, True, x, *args, writes=writes, steps=steps, **kwargs)
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        assert torch.equal(value, again[name]), name
    return other


class Counted(nn.Module):
    """A layer whose forward depends on how often it has run, and draws from all generators."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.calls = 0
        self.last = None

    def forward(self, x):
        self.calls += 1
        noise = random.random() + float(np.random.rand()) + torch.rand(())
        self.last = F.dropout(self.linear(x), 0.5) * self.calls * noise
        return torch.tanh(self.last)


def test_numbers_of_all_generators_and_attributes():
    model = assert_same(lambda: Rows(Counted(), Counted()), torch.randn(4, 8), steps=3)
    assert [block.calls for block in model.blocks] == [3, 3]


def test_what_a_block_keeps_of_its_forward_is_not_replaced():
    model = Rows(Counted())
    with recomputed_blocks(model.blocks, CPU, Writes()):
        output = model(torch.randn(4, 8))
    last = model.blocks[0].last
    output.sum().backward()
    assert model.blocks[0].last is last


def test_running_statistics_move_once():
    def make():
        norms = nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None)
        return Rows(*(nn.Sequential(nn.Conv2d(3, 3, 3), norm) for norm in norms))

    model = assert_same(make, torch.randn(2, 3, 8, 8), steps=3)
    assert int(model.blocks[0][1].num_batches_tracked) == 3


class Codebook(nn.Module):
    """Reads a buffer and writes it, in place or by another tensor."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("mean", torch.ones(8))
        self.in_place = in_place

    def forward(self, x):
        y = torch.tanh(self.linear(x) * self.mean.clone())
        new = 0.5 * self.mean + y.detach().mean(0)
        if self.in_place:
            self.mean.copy_(new)
        else:
            self.mean = new
        return y


def test_a_buffer_that_a_forward_reads_and_replaces():
    assert_same(lambda: Rows(Codebook(False), Codebook(False)), torch.randn(4, 8), steps=3)


def test_a_buffer_that_a_forward_reads_and_writes():
    assert_same(lambda: Rows(Codebook(True)), torch.randn(4, 8), steps=3, writes=Writes(all_=True))


def test_a_buffer_that_is_written_for_the_first_time_is_said_and_known_from_then_on():
    model, writes, x = Rows(Codebook(True)), Writes(), torch.randn(4, 8)
    with recomputed_blocks(model.blocks, CPU, writes):
        output = model(x)
    with pytest.raises(ValueError, match="wrote the buffer 'mean' of a Codebook for the first time"):
        output.sum().backward()
    assert not is_computed_again()
    with recomputed_blocks(model.blocks, CPU, writes):
        model(x).sum().backward()


def test_running_statistics_that_the_forward_reads():
    """An InstanceNorm's are written by the same kernel, which PyTorch does not count."""

    def make():
        norm = nn.InstanceNorm1d(3, track_running_stats=True, affine=True)
        return Rows(nn.Sequential(norm, nn.Conv1d(3, 3, 1)))

    assert_same(make, torch.randn(2, 3, 8), steps=2, writes=Writes(all_=True))


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, pair, *, masks=None, scale=1.0):
        x, other = pair
        y = torch.tanh(self.linear(x) * scale)
        if masks is not None:
            y = y * masks["a"] + other * masks["b"][0]
        return y, x if other is x else other * 2


def test_keywords_and_nested_values():
    class Model(Rows):
        def forward(self, x, **kwargs):
            pair = x, x.sin()
            for block in self.blocks:
                pair = block(pair, **kwargs)
            return pair[0] + pair[1]

    masks = {"a": torch.rand(4, 8), "b": [torch.rand(4, 8)]}
    assert_same(lambda: Model(Nested(), Nested()), torch.randn(4, 8), masks=masks, scale=2.0)


def test_a_tensor_that_is_given_twice_is_one_again():
    x, y = torch.ones(1), torch.ones(1)
    tree, tensors = apart((x, {"k": [x, y, 3]}), {"z": y})
    assert [x is tensors[0], y is tensors[1], len(tensors)] == [True, True, 2]
    args, kwargs = together(tree, tuple(tensors))
    assert args[0] is x
    assert args[1]["k"] == [x, y, 3]
    assert kwargs["z"] is y


def test_attention_gated_by_identity():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, dropout=0.3, batch_first=True)

        def forward(self, x):
            return self.inner(x, x, x, need_weights=False)[0]

    assert_same(lambda: Rows(Attention(), Attention()), torch.randn(2, 5, 8))


def test_tied_weights_and_a_block_that_runs_twice():
    class Model(Rows):
        def forward(self, x):
            for _ in range(2):
                for block in self.blocks:
                    x = block(x)
            return x

    def make():
        model = Model(*(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh()) for _ in range(2)))
        model.blocks[1][0].weight = model.blocks[0][0].weight
        return model

    assert_same(make, torch.randn(4, 8), steps=2)


def test_spectral_norm_and_pruning():
    def make():
        linear = nn.utils.spectral_norm(nn.Linear(8, 8))
        pruned = prune.l1_unstructured(nn.Linear(8, 8), "weight", amount=0.3)
        newer = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        return Rows(nn.Sequential(linear, nn.Tanh(), pruned, nn.Tanh(), newer))

    assert_same(make, torch.randn(4, 8), steps=2, writes=Writes(all_=True))


def test_without_gradients_blocks_just_run():
    model = Rows(Counted())
    with torch.no_grad(), recomputed_blocks(model.blocks, CPU, Writes()):
        output = model(torch.randn(4, 8))
    assert not output.requires_grad
    assert model.blocks[0].calls == 1


def test_the_model_is_as_before_afterwards():
    model = Rows(Counted(), Counted())
    patched = model.blocks[1].forward
    vars(model.blocks[1])["forward"] = patched
    with recomputed_blocks(model.blocks, CPU, Writes()):
        assert "forward" in vars(model.blocks[0])
    assert "forward" not in vars(model.blocks[0])
    with pytest.raises(RuntimeError, match="mat1 and mat2"), recomputed_blocks(model.blocks, CPU, Writes()):
        model(torch.ones(2, 7))
    assert "forward" not in vars(model.blocks[0])
    assert vars(model.blocks[1])["forward"] is patched


def test_own_hooks_of_a_block_run_once_and_those_inside_know_that_it_is_again():
    model = Rows(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    outer, inner = [], []
    model.blocks[0].register_forward_hook(lambda *_: outer.append(is_computed_again()))
    model.blocks[0][0].register_forward_hook(lambda *_: inner.append(is_computed_again()))
    with recomputed_blocks(model.blocks, CPU, Writes()):
        output = model(torch.randn(4, 8, requires_grad=True))
    output.sum().backward()
    assert outer == [False]
    assert inner == [False, True]


def test_a_graph_that_is_kept_is_gone_through_twice_with_the_same_result():
    model = Rows(Counted(), Codebook(True))
    x = torch.randn(4, 8, requires_grad=True)
    with recomputed_blocks(model.blocks, CPU, Writes(all_=True)):
        loss = model(x).sum()
    first = torch.autograd.grad(loss, [x, *model.parameters()], retain_graph=True)
    second = torch.autograd.grad(loss, [x, *model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_input_that_is_written_to_later_is_said():
    model, x = Rows(nn.Sequential(nn.Linear(8, 8), nn.Tanh())), torch.randn(4, 8)
    with recomputed_blocks(model.blocks, CPU, Writes()):
        output = model(x)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_block_with_a_checkpoint_of_its_own():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return checkpoint(lambda y: F.dropout(torch.tanh(self.linear(y)), 0.3), x, use_reentrant=False)

    assert_same(lambda: Rows(Own(), Own()), torch.randn(4, 8))


def test_autocast_is_that_of_the_forward():
    model = Rows(*(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU()) for _ in range(2)))
    x, found = torch.randn(16, 64), []
    for blocks in ((), model.blocks):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16), recomputed_blocks(blocks, CPU, Writes()):
            output = model(x)
        output.float().sum().backward()
        found.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
