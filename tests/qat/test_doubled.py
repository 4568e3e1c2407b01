"""A layer's result is added to itself in INT8 models too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_mp.qat import convert, prepare
from deepseek_mp.qat.doubled import double


class Twice(nn.Module):
    def __init__(self, layer, in_place=False):
        super().__init__()
        self.layer, self.in_place = layer, in_place

    def forward(self, x):
        x = self.layer(x)
        if self.in_place:
            x += x
            return x
        return x + x


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.Conv2d(4, 4, 1)])
def test_what_a_layer_gives_is_added_to_itself(layer, in_place):
    torch.manual_seed(0)
    model, x = Twice(layer, in_place).eval(), torch.randn(3, 4)
    x = x if isinstance(layer, nn.Linear) else x[..., None, None]
    expected = model(x)
    outputs = convert(prepare(model, x))(x)
    assert (outputs - expected).norm() < 0.05 * expected.norm()


def test_only_sums_of_one_tensor_with_itself_are_changed_and_they_have_the_same_bits():
    class Sums(nn.Module):
        def forward(self, x, y):
            return x + x, x + y, torch.add(x, x, alpha=3)

    x, y = torch.randn(5), torch.randn(5)
    graph = torch.export.export(Sums(), (x, y)).module(check_guards=False)
    expected = graph(x, y)
    double(graph)
    assert all(torch.equal(one, other) for one, other in zip(graph(x, y), expected, strict=True))
    assert len(graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mul.Tensor)) == 1
