"""Gradients of layers on their way to the rule for spikes, against the definitions."""

import pytest
import torch
from torch import nn

from deepseek_mp.controller import LossScaler
from deepseek_mp.optim import AdamW
from deepseek_mp.optim.offload import OffloadedOptimizer, OffloadSettings
from deepseek_mp.trainer import gradient_watch
from deepseek_mp.trainer.gradient_watch import ROWS, GradientWatch, _rows


class Watched:
    """A watch over the layers of a model; `lowered` are those named."""

    def __init__(self, model, optimizer, lowered=("0", "1"), **values):
        self.steps = 0
        layers = {name: module for name, module in model.named_children() if isinstance(module, nn.Linear)}
        self.watch = GradientWatch(optimizer, layers, lowered=lambda: lowered, steps=lambda: self.steps, **values)


def model():
    return nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))


def gradients(made):
    for parameter in made.parameters():
        parameter.grad = torch.randn_like(parameter)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, AdamW])
def test_norms_and_ratios_by_their_definitions(kind):
    made = model()
    optimizer = kind(made.parameters(), lr=1e-3, betas=(0.9, 0.8))
    seen = Watched(made, optimizer, lowered=("1",))
    for step in range(7):
        gradients(made)
        made[1].weight.grad *= 3.0 if step == 6 else 1.0
        optimizer.step()
        found = seen.watch.read()
        for name, gradient in found.items():
            weight = made[int(name)].weight
            assert gradient.norm == pytest.approx(float(weight.grad.norm()), rel=1e-5)
            if name == "0" or step < 4:  # one that is not lowered, and a moment that has not seen its five steps
                assert gradient.rms is None
            else:
                v = optimizer.state[weight]["exp_avg_sq"] / (1 - 0.8 ** (step + 1))
                assert gradient.rms == pytest.approx(float((weight.grad.square() / v).mean().sqrt()), rel=1e-4)
        seen.steps += 1
    assert set(found) == {"0", "1"}
    assert found["1"].rms > 1.3
    assert seen.watch.read() == {}


def test_second_moments_in_blocks_are_read():
    found = []
    for states in ("fp32", "8bit"):
        torch.manual_seed(0)
        made = nn.Sequential(nn.Linear(50, 100), nn.Linear(100, 4))
        optimizer = AdamW(made.parameters(), lr=0.0, betas=(0.9, 0.5), states=states)
        seen = Watched(made, optimizer, lowered=("0",))
        for _ in range(7):
            gradients(made)
            made[0].weight.grad *= torch.linspace(1, 2, 100).unsqueeze(1)
            optimizer.step()
            ratios = seen.watch.read()
            seen.steps += 1
        found.append(ratios["0"].rms)
    assert found[0] is not None
    assert found[1] == pytest.approx(found[0], rel=0.02)


def test_without_second_moments_there_are_norms_only():
    made = model()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    seen = Watched(made, optimizer)
    gradients(made)
    optimizer.step()
    assert {name: gradient.rms for name, gradient in seen.watch.read().items()} == {"0": None, "1": None}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_gradients_are_those_without_the_loss_scale(fused, shared, monkeypatch):
    made = nn.Sequential(nn.Linear(8, 16))
    optimizer = torch.optim.AdamW(made.parameters(), lr=1e-9, betas=(0.9, 0.5), fused=fused)
    scaler, x = LossScaler(1024.0), torch.randn(5, 8)
    expected = torch.autograd.grad(made(x).square().mean(), made[0].weight)[0]
    seen = Watched(made, optimizer, lowered=("0",), **({"norms": lambda: scaler.norms} if shared else {}))
    if shared:  # what the scaler knows is not computed again
        monkeypatch.delattr(gradient_watch, "norms")
    for step in range(3):
        optimizer.zero_grad()
        scaler.scale(made(x).square().mean()).backward()
        scaler.step(optimizer, max_grad_norm=1e-3 if shared else None)
        gradient = seen.watch.read()["0"]
        assert gradient.norm == pytest.approx(float(expected.norm()), rel=1e-4)
        if step:
            assert gradient.rms == pytest.approx(1.0, rel=1e-3)
        seen.steps += 1


def test_a_weight_without_a_gradient_is_left_out_and_a_removed_watch_sees_nothing():
    made = model()
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    seen = Watched(made, optimizer)
    made[0].weight.grad = torch.ones_like(made[0].weight)
    optimizer.step()
    assert set(seen.watch.read()) == {"0"}
    made[0].weight.grad = None
    optimizer.step()
    assert seen.watch.read() == {}
    gradients(made)
    seen.watch.remove()
    optimizer.step()
    assert seen.watch.read() == {}
    assert not optimizer._optimizer_step_pre_hooks


def test_all_rows_get_their_turn():
    tensor = torch.arange(200.0)[:, None]
    met = {float(value) for step in range(200) for value in _rows(tensor, step).flatten()}
    assert met == set(range(200))
    assert all(_rows(tensor, step).shape == (ROWS, 1) for step in range(200))
    assert _rows(tensor[:10], 7).shape == (10, 1)


@pytest.mark.parametrize("mode", ["sync", "speculative"])
def test_of_an_offloaded_optimizer_the_masters_are_looked_at(mode):
    """In 'speculative' their moments may be ahead of the step; they are put back before they are read."""
    found = []
    for offloads in (False, True):
        torch.manual_seed(0)
        made = model()
        options = {"lr": 1e-3, "betas": (0.9, 0.5)}
        settings = OffloadSettings(mode=mode, chunk_bytes=100)
        optimizer = (
            OffloadedOptimizer(made.parameters(), settings=settings, **options)
            if offloads
            else torch.optim.AdamW(made.parameters(), fused=True, **options)
        )
        scaler = LossScaler("none", device="cpu")
        seen = Watched(made, optimizer, lowered=("1",), norms=lambda scaler=scaler: scaler.norms)
        for _ in range(7):
            scaler.scale(made(torch.randn(5, 8)).square().mean()).backward()
            scaler.step(optimizer)
            found.append(seen.watch.read())
            seen.steps += 1
            optimizer.zero_grad()
    assert found[6]["1"].rms is not None
    assert found[:7] == found[7:]
