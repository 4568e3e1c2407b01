"""What an optimizer step does to a weight, against the definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from deepseek_mp.controller import LossScaler
from deepseek_mp.monitor.store import UPDATE, Layout, Store
from deepseek_mp.monitor.subjects import Choice, subjects_of
from deepseek_mp.monitor.updates import UPDATE_FIELDS, UpdateWatch
from deepseek_mp.optim import AdamW

CPU = torch.device("cpu")
ROWS = 8


class Watched:
    """A watch for the next step of an optimizer, the store it writes to, and what it said."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, store: Store | None = None) -> None:
        subjects = subjects_of(module)
        self.done: list[str] = []
        self.store = store or Store(Layout(units=len(subjects), ways=1, modules=1), CPU, 0.5)
        choice = Choice(ROWS, 0)
        self.watch = UpdateWatch(optimizer, subjects, self.store, choice, lambda: self.done.append("done"))


def numbers(store: Store) -> dict[str, float]:
    return dict(zip(UPDATE_FIELDS, store.parts.last[0, UPDATE, 0].tolist(), strict=False))


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    module = nn.Linear(16, ROWS, bias=False, dtype=dtype)
    module.weight.grad = torch.randn_like(module.weight)
    return module


def test_every_number_by_its_definition() -> None:
    module = linear()
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-4, betas=(0.9, 0.99), weight_decay=0.1)
    for _ in range(3):
        optimizer.step()
        module.weight.grad = torch.randn_like(module.weight)
    seen = Watched(module, optimizer)
    w, g = module.weight.detach().clone(), module.weight.grad.clone()
    assert seen.done == []
    optimizer.step()
    assert seen.done == ["done"]
    dw = module.weight.detach() - w
    stored = w.bfloat16().float()
    kept = (stored + dw).bfloat16().float() - stored
    v = optimizer.state[module.weight]["exp_avg_sq"] / (1 - 0.99**4)
    found = numbers(seen.store)
    assert found["ratio"] == pytest.approx(float(dw.norm() / w.norm()))
    assert found["lost"] == pytest.approx(float((kept == 0).float().mean()))
    assert 0.1 < found["lost"] < 0.95  # such a step is lost in part
    assert found["edq"] == pytest.approx(float((kept * dw).sum() / dw.square().sum()), rel=1e-5)
    assert found["grad_norm"] == pytest.approx(float(g.norm()))
    assert found["spike"] == 1
    assert found["rms"] == pytest.approx(float((g.square() / v).mean().sqrt()), rel=1e-5)


def test_a_second_moment_in_blocks_is_read() -> None:
    found = []
    for states in ("fp32", "8bit"):
        torch.manual_seed(0)
        module = nn.Linear(100, 2 * ROWS, bias=False)
        module.weight.grad = torch.randn_like(module.weight)
        optimizer = AdamW(module.parameters(), lr=1e-3, states=states)
        optimizer.step()
        seen = Watched(module, optimizer)
        optimizer.step()
        found.append(numbers(seen.store)["rms"])
    assert found[1] == pytest.approx(found[0], rel=0.02)


def test_large_updates_are_kept_and_tiny_ones_are_lost() -> None:
    found = {}
    for rate in (1e-1, 1e-7):
        module = linear()
        optimizer = torch.optim.SGD(module.parameters(), lr=rate)
        seen = Watched(module, optimizer)
        optimizer.step()
        found[rate] = numbers(seen.store)
    assert found[1e-1]["edq"] == pytest.approx(1, abs=0.01)
    assert found[1e-7]["edq"] == 0
    assert found[1e-7]["lost"] == 1
    assert all(torch.tensor(f["rms"]).isnan() for f in found.values())  # SGD has no second moment


def test_a_weight_in_16_bits_says_how_much_of_it_stays() -> None:
    module = linear(torch.bfloat16)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    seen = Watched(module, optimizer)
    before = module.weight.detach().clone()
    optimizer.step()
    found = numbers(seen.store)
    asked = module.weight.grad != 0
    assert found["lost"] == pytest.approx(float((module.weight == before)[asked].float().mean()))
    assert 0.1 < found["lost"] < 1
    assert torch.tensor(found["edq"]).isnan()


def all_of_it(rate: float | torch.Tensor, **marks: torch.Tensor) -> float:
    """Samples of steps on weights of one that BF16 cannot take."""
    module = linear(torch.bfloat16)
    nn.init.ones_(module.weight)
    module.weight.grad.fill_(1.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=rate, fused=bool(marks))
    for name, mark in marks.items():
        setattr(optimizer, name, mark)
    seen = Watched(module, optimizer)
    optimizer.step()
    assert (module.weight == 1).all()
    count = float(seen.store.parts.count[0, UPDATE])
    assert numbers(seen.store)["lost"] == count  # all of it, where it was counted
    return count


@pytest.mark.parametrize("rate", [1e-4, torch.tensor(1e-4)])
def test_of_a_weight_in_16_bits_all_may_be_lost(rate: float | torch.Tensor) -> None:
    assert all_of_it(rate) == 1
    assert all_of_it(rate, found_inf=torch.zeros(())) == 1


def test_a_step_that_asks_for_nothing_loses_nothing() -> None:
    assert all_of_it(0.0) == all_of_it(torch.tensor(0.0)) == 0
    assert all_of_it(1e-4, found_inf=torch.ones(())) == 0


def test_a_spike_is_over_the_mean_of_the_steps_before() -> None:
    module = linear()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    seen, g = None, module.weight.grad.clone()
    for size in (1.0, 3.0, 10.0):
        module.weight.grad = g * size
        seen = Watched(module, optimizer, None if seen is None else seen.store)
        optimizer.step()
        seen.watch.remove()
    assert seen is not None
    usual = (0.5 * 1 + 1.0 * 3) / 1.5  # decay 0.5
    assert numbers(seen.store)["spike"] == pytest.approx(10 / usual, rel=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_those_without_the_loss_scale(fused: bool) -> None:
    """Fused kernels are given the scale beside scaled gradients; other optimizers get unscaled ones."""
    module = nn.Linear(16, ROWS, bias=False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=fused)
    scaler = LossScaler(1024.0)
    x = torch.randn(5, 16)
    expected = torch.autograd.grad(module(x).square().mean(), module.weight)[0]
    for _ in range(2):  # the first waits for the host's verdict in any case
        optimizer.zero_grad()
        seen = Watched(module, optimizer)
        scaler.scale(module(x).square().mean()).backward()
        with torch.no_grad():
            before = module.weight.clone()
            scaler.step(optimizer)
        seen.watch.remove()
        assert numbers(seen.store)["grad_norm"] == pytest.approx(float(expected.norm()), rel=1e-4)
        assert 0.9 < numbers(seen.store)["rms"] < 1.1
        module.weight.data.copy_(before)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda module: module.weight.grad.fill_(float("nan")),  # skipped on the device, or a wrecked weight
        lambda module: module.weight.grad.zero_(),
    ],
)
def test_a_step_that_says_nothing_is_left_out(spoil: Callable[[nn.Module], Any]) -> None:
    module = linear()
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    seen = Watched(module, optimizer)
    spoil(module)
    optimizer.step()
    assert seen.done == ["done"]
    assert seen.store.parts.count[0, UPDATE] == 0
    assert not seen.store.parts.last.any()


@pytest.mark.parametrize("kind", ["none", "sparse"])
def test_a_weight_without_a_dense_gradient_is_left_out(kind: str) -> None:
    module = nn.Embedding(6, 4, sparse=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    seen = Watched(module, optimizer)
    if kind == "sparse":
        module(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert seen.done == ["done"]
    assert not seen.store.parts.count.any()


def test_a_weight_of_zeros_spoils_no_mean() -> None:
    module = linear()
    nn.init.zeros_(module.weight)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    seen = Watched(module, optimizer)
    optimizer.step()
    assert numbers(seen.store)["ratio"] == 0
    assert seen.store.parts.mean.isfinite()[0, UPDATE, 0, :5].all()


def test_only_the_next_step_is_looked_at_and_no_hook_stays() -> None:
    module = linear()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    seen = Watched(module, optimizer)
    for _ in range(3):
        optimizer.step()
    assert seen.done == ["done"]
    assert seen.store.parts.count[0, UPDATE] == 1
    seen.watch.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_parameters_of_other_optimizers_do_not_move_and_say_nothing() -> None:
    module = nn.Sequential(linear(), linear())
    optimizer = torch.optim.SGD(module[0].parameters(), lr=0.1)
    seen = Watched(module, optimizer)
    optimizer.step()
    assert seen.store.parts.count[:, UPDATE].tolist() == [1, 0]
