"""Parameters that kernels step: which are taken, and that what they share is right for each."""

import pytest
import torch
from torch import nn

from deepseek_mp.optim import AdamW
from deepseek_mp.optim.fused import FusedBatch, step_fused


def optimizer_of(count=3):
    params = [nn.Parameter(torch.randn(64, 64)) for _ in range(count)]
    for parameter in params:
        parameter.grad = torch.ones(64, 64)
    return AdamW(params, states="8bit", seed=7), params


def test_what_a_kernel_cannot_take_is_given_back():
    optimizer, (plain, strided, watched) = optimizer_of()
    strided.grad = torch.ones(64, 64).t()[:, torch.arange(64)].t()
    assert not strided.grad.is_contiguous()
    optimizer.watch([watched])
    seen = []
    left = step_fused(
        optimizer, [plain, strided, watched], lambda _: lambda *args: seen.append(args), lambda some: range(len(some))
    )
    assert [id(p) for p in left] == [id(strided), id(watched)]
    assert [(id(p), id(g), step) for p, g, step in seen] == [(id(plain), id(plain.grad), 0)]


def test_without_a_kernel_all_are_given_back():
    optimizer, params = optimizer_of()
    assert step_fused(optimizer, params, lambda _: None, lambda _: pytest.fail("there is no kernel")) == params


def test_each_parameter_has_its_own_number():
    optimizer, (one, two, three) = optimizer_of()
    optimizer.step()
    two.grad = None
    optimizer.step()
    about = FusedBatch.of(optimizer, optimizer.param_groups[0], [one, two, three], None, torch.zeros(()))
    number, known = about.numbers()
    assert number.tolist() == [2, 1, 2]
    assert number.dtype is torch.int64
    assert known.tolist() == [2.0, 1.0, 2.0]
    assert about.stored(one)["seed"] == 7
    assert about.blocks(one, "exp_avg").codes is optimizer.state[one]["exp_avg_codes"]
