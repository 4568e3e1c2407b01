"""BatchNorms keep the settings of the model through torchao's patterns, and are folded exactly."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.qat import FloatingModel, convert, prepare
from deepseek_mp.qat.modes import norms_of
from deepseek_mp.qat.norms import fold_norms


def test_mode_momentum_and_eps_are_those_of_the_model(simulated):
    settings = {str(norm.args[3].target): norm.args[5:8] for norm in norms_of(simulated.graph.graph)}
    assert settings == {
        "stem.1.running_mean": (True, 0.3, 0.1),
        "norm.running_mean": (True, 0.1, 1e-5),
        "row_norm.running_mean": (True, 0.1, 1e-5),
    }


def test_a_norm_that_cannot_be_folded_becomes_a_product_and_a_sum():
    model = nn.Sequential(
        nn.Linear(3, 3), nn.BatchNorm1d(3, eps=0.2), nn.Unflatten(1, (3, 1)), nn.BatchNorm1d(3, affine=False)
    )
    with torch.no_grad():
        for norm in (model[1], model[3]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.1, 2)
        model[1].weight.normal_()
        model[1].bias.normal_()
    simulated = prepare(model.eval(), torch.randn(4, 3))
    expected, graph = simulated(torch.ones(2, 3)), simulated.evaluated()
    fold_norms(graph)
    assert norms_of(graph.graph) == []
    torch.testing.assert_close(graph(torch.ones(2, 3)), expected)


def test_folded_the_graph_has_no_batch_norm_and_the_same_outputs(simulated, example):
    graph = simulated.evaluated()
    for module in graph.modules():
        if hasattr(module, "fake_quant_enabled"):
            module.disable_fake_quant()
    with torch.no_grad():
        before = graph(example)
        fold_norms(graph)
        assert norms_of(graph.graph) == []
        torch.testing.assert_close(graph(example), before)


def test_norms_without_weights_or_without_statistics_behind_convolutions():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False, eps=0.2), nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(),
        nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for norm in (model[1], model[7]):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.1, 2)
    simulated, x = prepare(model, torch.randn(4, 3, 8, 8)), torch.randn(3, 3, 8, 8)
    with simulated.observing():
        torch.testing.assert_close(simulated(x), model(x))
    assert {decision.new for decision in simulated.decisions} == {"int8"}
    torch.testing.assert_close(convert(simulated).reference(x), simulated(x), rtol=1e-4, atol=1e-4)
    simulated.train()(x).sum().backward()
    kept = [str(norm.args[3].target) for norm in norms_of(simulated.graph.graph)]
    assert kept == ["1.running_mean", "7.running_mean"]


@pytest.mark.parametrize("weights", [[0.0] * 4, [0.0, 1.5, -0.5, 1e-7]])
def test_channels_that_a_norm_turns_off_give_its_bias_and_are_trained(weights):
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))

        def forward(self, x):
            return x + self.branch(x)

    model = Adds().eval()
    with torch.no_grad():
        model.branch[1].weight.copy_(torch.tensor(weights))
        model.branch[1].bias.normal_()
        model.branch[1].running_var.uniform_(0.1, 2)
    example = torch.randn(4, 4, 8, 8)
    simulated, x = prepare(model, example), example[:1]  # other values would be beyond its range
    with simulated.observing():
        torch.testing.assert_close(simulated(x), model(x))
    int8 = convert(simulated)
    for form in (simulated, int8.reference, FloatingModel(simulated, torch.float32)):
        assert (form(x) - model(x)).norm() < 0.02 * model(x).norm()
    simulated.train()(x).square().sum().backward()
    model.train()(x).square().sum().backward()
    off = model.branch[1].weight.abs() < 0.1
    found, expected = simulated.graph.get_parameter("branch.1.weight").grad, model.branch[1].weight.grad
    torch.testing.assert_close(found[off], expected[off], rtol=0.1, atol=1)


def test_without_momentum_statistics_are_averages_of_all_batches():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.BatchNorm2d(3, momentum=None), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None), nn.ReLU(),
        nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip
    batches = [torch.randn(8, 3, 6, 6) * scale for scale in (1, 2, 3, 4)]
    model(batches[0])
    simulated = prepare(model, batches[0])
    assert [model[0].momentum, model[2].momentum] == [None, None]
    for batch in batches[1:]:
        model(batch)
        deepcopy(simulated)(batch)
        simulated(batch)
    assert simulated.graph.get_buffer("0.num_batches_tracked") == 4
    for name, value in model.named_buffers():
        exact = name.startswith("0")  # what the other one is given was rounded
        torch.testing.assert_close(
            simulated.graph.get_buffer(name), value, rtol=1e-6 if exact else 0.03, atol=1e-6 if exact else 0.01
        )
    simulated.norms_frozen = True
    simulated(batches[0])
    assert simulated.graph.get_buffer("0.num_batches_tracked") == 4
    expected = simulated.eval()(batches[0])
    torch.testing.assert_close(convert(simulated).reference(batches[0]), expected, rtol=1e-2, atol=2e-2)


def test_a_norm_in_evaluation_keeps_its_statistics_without_momentum_too():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None))
    model[1].eval()
    simulated = prepare(model, torch.randn(4, 3, 6, 6))
    simulated(torch.randn(4, 3, 6, 6))
    assert torch.equal(simulated.graph.get_buffer("1.running_mean"), torch.zeros(8))


def test_without_momentum_under_autocast_is_refused():
    class Casts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=None)

        def forward(self, x):
            with torch.autocast("cpu"):
                return self.norm(self.conv(x))

    with pytest.raises(ConfigError, match="'norm' with momentum=None, called under autocast or the like"):
        prepare(Casts(), torch.randn(4, 3, 6, 6))
