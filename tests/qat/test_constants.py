"""Constants are computed once, integers stay integers, and weights without a reader leave the graph."""

from __future__ import annotations

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
