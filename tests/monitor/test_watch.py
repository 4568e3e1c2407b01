"""Compiled models: seen at each call, counted uncompiled on sampled steps, and not compiled again for it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters

from deepseek_mp.monitor import PrecisionMonitor, Usage


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    assert torch._dynamo.eval_frame._stance.stance == "default"
    assert torch._C._len_torch_dispatch_stack() == 0
    torch._dynamo.reset()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def whole() -> nn.Module:
    return torch.compile(Net(), backend="eager", fullgraph=True)


def in_place() -> nn.Module:
    model = Net()
    model.compile(backend="eager", fullgraph=True)
    return model


def by_block_in_place() -> nn.Module:
    model = Net()
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    return model


def by_block_wrapped() -> nn.Module:
    model = Net()
    for index, block in enumerate(model.blocks):
        model.blocks[index] = torch.compile(block, backend="eager", fullgraph=True)
    return model


def train(model: nn.Module, steps: int) -> list[int]:
    """Graphs compiled so far, after each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    graphs = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
        graphs.append(counters["stats"]["unique_graphs"])
    return graphs


@pytest.mark.parametrize("make", [whole, in_place, by_block_in_place, by_block_wrapped])
def test_counted_as_uncompiled_and_not_compiled_again(make: Callable[[], nn.Module]) -> None:
    plain = Net()
    with PrecisionMonitor(plain, sample_every=3) as monitor:
        train(plain, 7)
        expected = monitor.log_precision_usage()

    model = make()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*global hooks")
        with PrecisionMonitor(model, sample_every=3) as monitor:
            graphs = train(model, 7)
            usage = monitor.log_precision_usage()
        train(model, 1)
    assert usage.compiled_counted_eagerly
    assert not expected.compiled_counted_eagerly
    assert (usage.steps, usage.sampled_steps) == (7, 3)
    assert usage.layers == expected.layers  # names have no `_orig_mod` in them
    assert graphs[0] == 0  # the first step is a sampled one
    assert graphs[1] > 0
    assert graphs[-1] == graphs[1]
    assert counters["stats"]["unique_graphs"] == graphs[1]
    assert not counters["graph_break"]


def test_sample_counts_compiled_parts_too() -> None:
    model = in_place()
    train(model, 1)
    with PrecisionMonitor(model, sample_every=None) as monitor:
        with monitor.sample():
            model(torch.ones(2, 4)).sum().backward()
        usage = monitor.log_precision_usage()
    assert usage.layers["blocks.1.linear"]["mm"]["fp32"].backward == 2


def test_compiled_after_the_monitor_was_made() -> None:
    model = Net()
    with PrecisionMonitor(model, sample_every=2) as monitor:
        model.compile(backend="eager", fullgraph=True)
        train(model, 2)
        first = monitor.log_precision_usage()
        train(model, 2)
        second = monitor.log_precision_usage()
    assert first.steps == 0
    assert "compiled after the monitor was made" in first.notes[0]
    assert (second.steps, second.sampled_steps, second.notes) == (2, 1, ())


def test_closing_gives_the_compiled_call_back() -> None:
    model = in_place()
    call = model._compiled_call_impl
    PrecisionMonitor(model).close()
    assert model._compiled_call_impl is call


def test_the_original_of_a_compiled_model_is_said_not_to_be_called() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with PrecisionMonitor(model) as monitor:
        compiled(torch.ones(2, 4))
        usage = monitor.log_precision_usage()
    assert "give the result of torch.compile to the monitor" in usage.notes[0]


def test_a_compiled_optimizer_and_a_compiled_loss() -> None:
    """The dispatch state is put back when a compiled call ends, so the monitor changes nothing inside one."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of = torch.compile(lambda y: y.square().sum(), backend="eager")
    update = torch.compile(lambda: optimizer.step(), backend="eager")
    reports: list[Usage] = []
    with PrecisionMonitor(model, sample_every=2) as monitor:
        for _ in range(4):
            loss_of(model(torch.ones(2, 4))).backward()
            update()
            torch.zeros(2).cosh_()
            optimizer.zero_grad(set_to_none=False)
        reports.append(monitor.log_precision_usage())
    assert reports[0].sampled_steps == 2
    assert "cosh_" not in reports[0].ops
    assert "_foreach_add_" not in reports[0].ops


@pytest.mark.parametrize("hidden", [False, True])
def test_a_step_that_is_compiled_as_a_whole_is_not_sampled(hidden: bool) -> None:
    model = Net()
    call: Callable[[Tensor], Any] = torch._dynamo.disable(lambda x: model(x)) if hidden else model
    step = torch.compile(lambda x: call(x).square().sum(), backend="eager")
    with PrecisionMonitor(model, sample_every=1) as monitor:
        for _ in range(2):
            step(torch.ones(2, 4)).backward()
        usage = monitor.log_precision_usage()
    assert usage.sampled_steps == 0
    assert len(usage.notes) == 1
