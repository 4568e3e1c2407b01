"""Convolutions with a padding by name compute the same with numbers, and are quantised."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_mp.qat import prepare
from deepseek_mp.qat.named_padding import number_paddings


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("options", [{"kernel_size": 3}, {"kernel_size": 4, "dilation": 3, "groups": 2, "bias": False}])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_outputs_are_the_same(kind, options, padding):
    layer, x = kind(2, 4, padding=padding, **options), torch.randn(2, 2, *(17, 15)[: 1 + (kind is nn.Conv2d)])
    graph = torch.export.export(layer, (x,)).module(check_guards=False)
    number_paddings(graph)
    torch.testing.assert_close(graph(x), layer(x))
    assert not [node for node in graph.graph.nodes if str(node.target).endswith(".padding")]


def test_sides_that_differ():
    layer, x = nn.Conv2d(2, 3, (4, 3), padding="same", dilation=(1, 2)), torch.randn(2, 2, 9, 8)
    graph = torch.export.export(layer, (x,)).module(check_guards=False)
    number_paddings(graph)
    torch.testing.assert_close(graph(x), layer(x))


@pytest.mark.parametrize(("kind", "norm"), [(nn.Conv1d, nn.BatchNorm1d), (nn.Conv2d, nn.BatchNorm2d)])
def test_they_are_quantised(kind, norm):
    model = nn.Sequential(kind(2, 4, 4, padding="same"), norm(4), nn.ReLU(), kind(4, 2, 3, padding="same"))
    simulated = prepare(model.eval(), torch.randn(2, 2, *(8, 8)[: 1 + (kind is nn.Conv2d)]))
    x = torch.randn(3, *simulated.example[0][0].shape[1:])
    assert {decision.new for decision in simulated.decisions} == {"int8"}
    with simulated.observing():
        torch.testing.assert_close(simulated(x), model(x))
