"""Activations are recognised by their values, whatever they are composed of; what only looks like one is not."""

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from deepseek_mp.nn.graph_activations import _numbers, read_by_casts_only, recognised
from deepseek_mp.nn.graph_casts import casts_of
from deepseek_mp.ops.schema import quantise

SHAPE = (64, 128)


def graph_of(f, count, *, dtype=torch.bfloat16, shown=False):
    """The graph of a cast of f; with `shown`, f's result is an output too."""

    def run(*inputs):
        made = f(*inputs)
        q = quantise(made.contiguous(), "fp8_e4m3", "1x128", False, True, True, "reference")[0]
        return (q, made @ made.t()) if shown else q

    inputs = [torch.randn(SHAPE, dtype=dtype) for _ in range(count)]
    return make_fx(run, select_decomp_table(), tracing_mode="fake")(*inputs).graph


def found(f, count, **how):
    """The name of the source that the cast of f computes, and which inputs it reads, by number."""
    graph = graph_of(f, count, **how)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    (cast,) = casts_of(graph)
    made = recognised(cast)
    return made and (made.source, tuple(placeholders.index(node) for node in made.inputs))


COMPOSED = {
    "sigmoid": (lambda x: x * torch.sigmoid(x), 1, ("silu", (0,))),
    "exp": (lambda x: x / (1 + torch.exp(-x.float())), 1, ("silu", (0,))),
    "erf": (lambda x: 0.5 * x.float() * (1 + torch.erf(x.float() * 0.5**0.5)), 1, ("gelu", (0,))),
    "relu": (F.relu, 1, ("relu", (0,))),
    "gated": (lambda up, x: up * (x * torch.sigmoid(x)), 2, ("silu_gate", (1, 0))),
    "gradient": (lambda g, x: g * torch.sigmoid(x) * (1 + x * (1 - torch.sigmoid(x))), 2, ("silu_grad", (1, 0))),
}
NEARLY = {
    "scaled": (lambda x: 1.001 * x * torch.sigmoid(x), 1),
    "shifted": (lambda x: x * torch.sigmoid(x) + 1e-3, 1),
    "quick gelu": (lambda x: x * torch.sigmoid(1.702 * x), 1),
    "leaky": (lambda x: torch.where(x <= 0, x * 0.01, x), 1),
    "of a sum": (lambda x, y: F.relu(x + y), 2),
}


@pytest.mark.parametrize("name", COMPOSED)
def test_a_composition_is_known_by_its_values(name):
    f, count, expected = COMPOSED[name]
    assert found(f, count) == expected


@pytest.mark.parametrize("name", NEARLY)
def test_what_is_nearly_an_activation_is_none(name):
    assert found(*NEARLY[name]) is None


def test_only_bf16_inputs_are_read_inside_a_cast():
    assert found(lambda x: x * torch.sigmoid(x), 1, dtype=torch.float32) is None


def test_a_tensor_that_is_stored_anyway_is_read_instead():
    f = COMPOSED["sigmoid"][0]
    (cast,) = casts_of(graph_of(f, 1, shown=True))
    assert not read_by_casts_only(cast.x)
    assert recognised(cast) is None


def test_functions_are_compared_on_the_host():
    with torch.device("meta"):
        assert all(column.is_cpu for column in _numbers(2))
