"""Parameters that kernels step: which are taken, and that what they share is right for each."""

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Step:
    compensation: torch.Tensor | None = None


def test_what_a_kernel_cannot_take_is_given_back():
    optimizer, (plain, without, watched) = optimizer_of()
    without.grad = None
    optimizer.watch([watched])
    seen = []
    left = step_fused(
        optimizer, [plain, without, watched], lambda _: lambda *args: seen.append(args), lambda some: [Step()]
    )
    assert [id(p) for p in left] == [id(without), id(watched)]
    assert [(id(p), id(g), step) for p, g, step in seen] == [(id(plain), id(plain.grad), Step())]


@pytest.mark.parametrize("which", ["parameter", "gradient", "compensation"])
def test_a_kernel_sees_the_order_of_flatten_whatever_memory_has(which):
    """As of weights in channels_last: a kernel runs over memory from the first value to the last."""
    weight, grad, rest = (torch.randn(4, 3, 2, 2) for _ in range(3))
    given = {"parameter": weight.clone(), "gradient": grad.clone(), "compensation": rest.clone()}
    given[which] = given[which].contiguous(memory_format=torch.channels_last)
    parameter, compensation = nn.Parameter(given["parameter"]), given["compensation"]
    parameter.grad = given["gradient"]

    def kernel(value, gradient, step):
        flat, by, left = (t.as_strided((t.numel(),), (1,)) for t in (value, gradient, step.compensation))
        flat -= by * torch.arange(len(flat))
        left += by

    with torch.no_grad():
        steps = [Step(compensation=compensation)]
        step_fused(AdamW([parameter], states="8bit"), [parameter], lambda _: kernel, lambda some: steps)
    number = torch.arange(weight.numel()).view_as(weight)
    torch.testing.assert_close(parameter.data, weight - grad * number)
    torch.testing.assert_close(compensation, rest + grad)
    assert parameter.stride() == given["parameter"].stride()


def test_without_a_kernel_all_are_given_back():
    optimizer, params = optimizer_of()
    assert step_fused(optimizer, params, lambda _: None, lambda _: pytest.fail("there is no kernel")) == params


def test_each_parameter_has_its_own_number():
    optimizer, (one, two, three) = optimizer_of()
    optimizer.step()
    two.grad = None
    optimizer.step()
    about = FusedBatch.of(optimizer, optimizer.param_groups[0], [one, two, three], None, torch.zeros(()))
    number, known = about.counts()
    assert number.tolist() == [2, 1, 2]
    assert number.dtype is torch.int64
    assert known.tolist() == [2.0, 1.0, 2.0]
    assert about.stored(one)["seed"] == 7
    assert about.blocks(one, "exp_avg").codes is optimizer.state[one]["exp_avg_codes"]
