"""FP8 products of one input share its cast in a graph, and give the same."""

import pytest
import torch
import torch._dynamo

from deepseek_mp.nn import graph_products, graph_row_casts
from deepseek_mp.nn.graph_row_casts import share_row_casts
from deepseek_mp.ops.native.fp8_linear import plain_row_cast
from deepseek_mp.ops.weight_only import quantised_weight

(QA, SA), (QB, SB) = (quantised_weight(torch.randn(32, 64), "fp8") for _ in range(2))
BIAS = torch.randn(32).to(torch.bfloat16)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Products in FP32, since not every CPU has one of FP8 by row; casts are the native ones."""

    def product(values, row_scale, q, scale, bias, dtype):
        out = (values.float() * row_scale) @ (q.float() * scale[:, None]).t()
        return (out if bias is None else out + bias).to(dtype)

    def plain(x, q, scale, bias):
        return product(*plain_row_cast(x), q, scale, bias, x.dtype)

    torch._dynamo.allow_in_graph(plain)
    monkeypatch.setattr(graph_products, "_PARTS", {plain: {"q": 0, "scale": 0, "bias": 0}})
    monkeypatch.setattr(graph_products, "_NAMES", {plain: ("x", "q", "scale", "bias")})
    for module in (graph_products, graph_row_casts):
        monkeypatch.setattr(module, "plain", plain)
        monkeypatch.setattr(module, "cast_product", product)
    yield plain
    torch._dynamo.disallow_in_graph(plain)


def run(function, x):
    """Outputs of the rewritten graph, casts that it has fewer, and those that it has beside its products."""
    spared, casts = [], []

    def backend(graph, _inputs):
        spared.append(share_row_casts(graph))
        casts.append(sum(node.target is plain_row_cast for node in graph.graph.nodes))
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(function, backend=backend)(x), spared, casts


def test_one_with_a_bias_and_one_without_share_the_cast(wide):
    def function(x):
        return wide(x, QA, SA, BIAS), wide(x, QB, SB, None)

    x = torch.randn(5, 64).to(torch.bfloat16)
    found, spared, casts = run(function, x)
    assert all(torch.equal(one, two) for one, two in zip(found, function(x), strict=True))
    assert (spared, casts) == ([1], [1])


def test_products_of_other_inputs_keep_theirs(wide):
    def function(x):
        y = x * 1
        one = wide(y, QA, SA, None)
        y.mul_(2)
        return one, wide(y, QB, SB, None)

    x = torch.randn(5, 64).to(torch.bfloat16)
    found, spared, casts = run(function, x)
    assert all(torch.equal(one, two) for one, two in zip(found, function(x), strict=True))
    assert (spared, casts) == ([0], [0])
