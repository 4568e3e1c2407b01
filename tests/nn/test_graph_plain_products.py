"""Opaque FP8 products of a graph become ops that a compiler sees through, and give what they gave."""

import pytest
import torch
from torch import fx

from deepseek_mp.nn import graph_plain_products
from deepseek_mp.nn.graph_plain_products import open_products
from deepseek_mp.ops.fp8_linear import fp8_linear
from deepseek_mp.ops.weight_only import quantised_weight

Q, SCALE = quantised_weight(torch.randn(32, 64), "fp8")
BIAS = torch.randn(32).to(torch.bfloat16)
X = torch.randn(5, 64).to(torch.bfloat16)


def graph(implementation):
    made = fx.Graph()
    x, q, scale, bias = (made.placeholder(name) for name in ("x", "q", "scale", "bias"))
    first = made.call_function(torch.ops.deepseek_mp.fp8_linear.default, (x, q, scale, bias, implementation))
    second = made.call_function(torch.ops.deepseek_mp.fp8_linear.default, (x, q, scale, None, implementation))
    made.output((first, second))
    return fx.GraphModule({}, made)


def test_native_ones_are_opened_with_all_that_they_were_given(monkeypatch):
    def reference(x, q, scale, bias):  # not every CPU has a product of FP8 by row
        return fp8_linear(x, q, scale, bias, implementation="reference")

    monkeypatch.setattr(graph_plain_products, "plain", reference)
    opened = graph("native")
    assert open_products(opened) == 2
    expected = graph("reference")(X, Q, SCALE, BIAS)
    assert all(torch.equal(one, two) for one, two in zip(opened(X, Q, SCALE, BIAS), expected, strict=True))
    assert open_products(opened) == 0


@pytest.mark.parametrize("implementation", ["reference", "triton"])
def test_others_stay(implementation):
    given = graph(implementation)
    before = [(node.target, node.args) for node in given.graph.nodes]
    assert open_products(given) == 0
    assert [(node.target, node.args) for node in given.graph.nodes] == before
