"""Constants are computed once, integers stay integers, and weights without a reader leave the graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_mp.qat import convert
from deepseek_mp.qat.constants import fold_constants


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.register_buffer("small", torch.randn(1))

    def forward(self, x):
        wide = self.small.expand(1000)  # would be a thousand times as large
        return x * (self.used.exp() + 1).neg() + wide.sum()


def test_what_is_computed_from_weights_alone_is_a_constant():
    model, x = Net(), torch.randn(2, 4)
    graph = torch.export.export(model, (x,)).module(check_guards=False)
    expected = graph(x)
    fold_constants(graph)
    assert torch.equal(graph(x), expected)
    called = [node.target.overloadpacket.__name__ for node in graph.graph.nodes if node.op == "call_function"]
    assert sorted(called) == ["add", "expand", "mul", "sum"]
    assert [tuple(tensor.shape) for tensor in graph.state_dict().values()] == [(1,), (4,)]


def test_an_int8_model_holds_each_weight_once_and_computes_nothing_from_constants(simulated):
    graph = convert(simulated).graph
    floats = [tensor for tensor in graph.state_dict().values() if tensor.is_floating_point()]
    integers = [tensor for tensor in graph.state_dict().values() if tensor.dtype == torch.int8]
    assert len(integers) == 4
    kept = simulated.graph.get_parameter("last.weight")
    assert [tuple(tensor.shape) for tensor in floats if tensor.dim() > 1] == [tuple(kept.shape)]
    computed = [node for node in graph.graph.nodes if node.op == "call_function"]
    alone = [node for node in computed if all(source.op == "get_attr" for source in node.all_input_nodes)]
    assert {str(node.target) for node in alone} == {"quantized_decomposed.dequantize_per_channel.default"}


class Follower(nn.Module):
    """State that is read, and replaced or written to, also through a view."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x):
        if self.in_place:
            decayed = self.mean.view(2, 2) * 0.5
            self.mean.view(2, 2).mul_(0.5).add_(x.mean())
        else:
            decayed = self.mean * 0.5
            self.mean = decayed + x.mean()
        return x + decayed.flatten()


@pytest.mark.parametrize("in_place", [False, True])
def test_what_the_forward_writes_to_is_no_constant(in_place):
    x = torch.randn(3, 4)
    graph = torch.export.export(Follower(in_place), (x,)).module(check_guards=False)
    expected = [graph(x) for _ in range(3)]
    graph.mean.fill_(1)
    fold_constants(graph)
    assert all(torch.equal(graph(x), outputs) for outputs in expected)


class Halves(nn.Module):
    """State of which a half is written to, that one of several views is."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(4))

    def forward(self, x):
        decayed = self.mean * 0.5
        first, _ = self.mean.chunk(2)
        first.add_(1)
        return x + decayed


def test_what_the_forward_writes_to_through_one_of_several_views_is_no_constant():
    x = torch.randn(3, 4)
    graph = torch.export.export(Halves(), (x,)).module(check_guards=False)
    expected = [graph(x) for _ in range(3)]
    graph.mean.fill_(1)
    fold_constants(graph)
    assert all(torch.equal(graph(x), outputs) for outputs in expected)
