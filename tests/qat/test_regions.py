"""Regions without gradients, or with autocast off, are a part of the graph: modes, rounding and state reach them."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from deepseek_mp.qat import convert, prepare
from deepseek_mp.qat.regions import inline_regions


class Region(nn.Module):
    """A backbone in a region of its own, and a head behind it."""

    def __init__(self, region):
        super().__init__()
        self.region = region
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        with self.region():
            features = self.backbone(x).mean((2, 3))
        return self.head(features)


def without_autocast():
    return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize("region", [torch.no_grad, without_autocast])
def test_what_is_in_a_region_is_rounded_and_runs_in_evaluation(region):
    torch.manual_seed(0)
    model, x = Region(region).eval(), torch.randn(8, 3, 8, 8)
    model.backbone[1].running_mean.normal_()
    model.backbone[1].running_var.uniform_(0.5, 2)
    simulated = prepare(model, x)
    assert {decision.layer: decision.new for decision in simulated.decisions} == {"backbone.0": "int8", "head": "int8"}
    with torch.no_grad():
        expected = model(x)
    for outputs in (simulated(x), convert(simulated)(x)):
        assert (outputs - expected).norm() < 0.05 * expected.norm()
    torch.testing.assert_close(simulated.graph.get_buffer("backbone.1.running_mean"), model.backbone[1].running_mean)


class WithAutocast(Region):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            features = self.backbone(x).mean((2, 3))
        return self.head(features.float())


def test_what_is_in_a_region_with_autocast_runs_in_evaluation_too():
    torch.manual_seed(0)
    model, x = WithAutocast(None).eval(), torch.randn(8, 3, 8, 8)
    model.backbone[1].running_mean.normal_()
    with torch.no_grad():
        expected = model(x)
    simulated = prepare(model, x).eval()
    int8 = convert(simulated)
    for outputs in (simulated(x), int8.reference(x), int8(x), int8(x)):
        assert (outputs - expected).norm() < 0.05 * expected.norm()


class Kept(nn.Module):
    """State that follows an output without gradients, and is read before."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x):
        outputs, before = self.linear(x), self.mean * 2 + 1
        with torch.no_grad():
            self.mean.mul_(0.5).add_(outputs.mean(0))
            scale = self.linear.weight.abs().sum()
        return (outputs - before) / scale


def test_state_that_is_written_in_a_region_is_read_in_every_call():
    torch.manual_seed(0)
    model, x = Kept().eval(), torch.randn(4, 4)
    int8 = convert(prepare(model, x))
    for _ in range(3):
        with torch.no_grad():
            expected = model(x)
        torch.testing.assert_close(int8.reference(x), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("make", [Kept, lambda: Region(torch.no_grad)])
def test_gradients_are_those_of_the_model(make):
    torch.manual_seed(0)
    model = make()
    if isinstance(model, Region):
        model.backbone[3].p = 0.0
    x = torch.randn(4, 4) if isinstance(model, Kept) else torch.randn(4, 3, 8, 8)
    graph = torch.export.export(deepcopy(model), (x,)).module(check_guards=False)
    inline_regions(graph)
    assert not [node for node in graph.graph.nodes if isinstance(node.target, torch._ops.HigherOrderOperator)]
    found = dict(graph.named_parameters())
    for _ in range(2):  # state must not hold a history
        outputs, expected = graph(x), model(x)
        assert torch.equal(outputs, expected)
        outputs.square().sum().backward()
        expected.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert found[name].grad is None
        else:
            torch.testing.assert_close(found[name].grad, parameter.grad)


def test_a_region_in_a_region_and_one_that_turns_autocast_on():
    class Nested(nn.Module):
        def forward(self, x):
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                x = x.exp()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return x @ x

    model, x = Nested(), torch.randn(4, 4)
    graph = torch.export.export(model, (x,)).module(check_guards=False)
    inline_regions(graph)
    assert torch.equal(graph(x), model(x))
    left = [node for node in graph.graph.nodes if isinstance(node.target, torch._ops.HigherOrderOperator)]
    assert [node.target.__name__ for node in left] == ["wrap_with_autocast"]


def test_a_layer_with_spectral_norm_says_that_it_stays():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))  # it writes to its vectors while it trains
    simulated = prepare(nn.Sequential(nn.Linear(4, 4), layer), torch.rand(4, 4))
    found = {decision.layer: decision for decision in simulated.decisions}
    assert (found["0"].new, found["1"].new) == ("int8", "fp32")
    assert found["1"].detail.startswith("its weight is computed in every call")
    assert convert(simulated)(torch.rand(3, 4)).isfinite().all()
