"""Rounded layers share the parameters of those that they replace, and compute with the stored values."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepseek_mp.ops.fp8_linear import fp8_linear
from deepseek_mp.ops.int4_linear import int4_weight
from deepseek_mp.ops.reference.int4_linear import widened as widened4
from deepseek_mp.ops.weight_only import quantised_weight
from deepseek_mp.qat.rounded_layers import rounded, rounded_layers
from deepseek_mp.qat.straight_through import learned_step


def widened(weight, format):
    q, scale = quantised_weight(weight, format)
    return q.float() * scale[:, None]


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_multiplies_the_stored_weight(format, bias):
    plain = nn.Linear(16, 8, bias=bias)
    layer, x = rounded(plain, f"{format}_weights", learn_step=False), torch.randn(2, 3, 16)
    assert torch.equal(layer(x), F.linear(x, widened(plain.weight, format), plain.bias))
    assert layer.weight is plain.weight
    assert list(layer.state_dict()) == list(plain.state_dict())
    layer(x).square().sum().backward()
    assert all(param.grad is not None for param in plain.parameters())
    q, scale = layer.kept().values()
    expected = quantised_weight(plain.weight, format)
    assert torch.equal(q.float(), expected[0].float())
    assert torch.equal(scale, expected[1])


@pytest.mark.parametrize("learn_step", [False, True])
def test_an_embedding_gives_rows_of_the_stored_table(learn_step):
    plain = nn.Embedding(20, 16, padding_idx=3)
    layer, index = rounded(plain, "int8_weights", learn_step=learn_step), torch.tensor([[1, 3, 19], [1, 0, 7]])
    q, scale = layer.kept().values()
    assert torch.equal(layer(index), F.embedding(index, q.float() * scale[:, None]))
    assert learn_step or torch.equal(layer(index), F.embedding(index, widened(plain.weight, "int8")))
    layer(index).sum().backward()
    assert not plain.weight.grad[[2, 3]].any()
    assert plain.weight.grad[1].any()
    if learn_step:
        assert set(layer.log_step.grad.nonzero().flatten().tolist()) <= {0, 1, 3, 7, 19}


def test_the_mode_stays_and_all_are_found():
    plain = nn.Linear(4, 4).eval()
    model = nn.Sequential(nn.Linear(4, 4), rounded(plain, "int8_weights", learn_step=True))
    assert list(rounded_layers(model)) == ["1"]
    assert not model[1].training
    assert list(dict(model[1].named_parameters())) == ["weight", "bias", "log_step"]


def test_a_step_begins_at_that_of_the_largest_weight_and_is_learned_as_a_logarithm():
    plain = nn.Linear(16, 8)
    layer, x = rounded(plain, "int8_weights", learn_step=True), torch.randn(3, 16)
    assert torch.equal(layer(x), F.linear(x, widened(plain.weight, "int8"), plain.bias))
    with torch.no_grad():
        layer.log_step.fill_(-0.7)
    q, scale = layer.kept().values()
    torch.testing.assert_close(scale, quantised_weight(plain.weight, "int8")[1] * math.exp(-0.7))
    assert torch.equal(layer(x), F.linear(x, q.float() * scale[:, None], plain.bias))
    layer(x).sum().backward()
    step = scale.clone().requires_grad_()
    F.linear(x, learned_step(plain.weight, step, "int8")).sum().backward()
    torch.testing.assert_close(layer.log_step.grad, step.grad * scale)


@pytest.mark.parametrize("learn_step", [False, True])
def test_a_layer_in_4_bits_multiplies_the_stored_weight(learn_step):
    plain, x = nn.Linear(192, 8), torch.randn(2, 3, 192)
    layer = rounded(plain, "int4_weights", learn_step=learn_step)
    assert torch.equal(layer(x), F.linear(x, widened4(*int4_weight(plain.weight)), plain.bias))
    if learn_step:
        assert layer.log_step.shape == (8, 3)
        with torch.no_grad():
            layer.log_step.copy_(torch.linspace(-1, 0.2, 24).view(8, 3))
    kept = layer.kept()
    assert list(kept) == ["q", "scale", "zero"]
    assert torch.equal(layer(x), F.linear(x, widened4(**kept), plain.bias))
    assert torch.equal(layer.rounded_weight(), widened4(**kept))
    layer(x).square().sum().backward()
    assert all(param.grad is not None and param.grad.any() for param in layer.parameters())


def test_a_learned_scale_in_4_bits_is_that_of_the_range_times_the_exponential():
    layer = rounded(nn.Linear(64, 8), "int4_weights", learn_step=True)
    whole = layer.kept()
    with torch.no_grad():
        layer.log_step.fill_(-0.7)
    torch.testing.assert_close(layer.kept()["scale"], whole["scale"] * math.exp(-0.7))
    assert torch.equal(layer.kept()["zero"], whole["zero"])


def test_a_layer_in_fp8_rounds_its_input_too():
    plain, x = nn.Linear(32, 16), torch.randn(2, 3, 32, requires_grad=True)
    layer = rounded(plain, "fp8", learn_step=False)
    kept, rows = layer.kept(), x.detach().flatten(0, 1)
    expected = fp8_linear(rows, kept["q"], kept["scale"], plain.bias, implementation="reference").view(2, 3, 16)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    weights_alone = rounded(plain, "fp8_weights", learn_step=False)(x)
    assert (layer(x) - weights_alone).abs().max() > 1e-3
    layer(x).square().sum().backward()
    assert all(part.grad is not None and part.grad.any() for part in (x, plain.weight, plain.bias))


def test_tables_beside_them_are_stored_in_8_bits():
    plain = nn.Embedding(20, 32)
    for precision, format in (("int4_weights", "int8"), ("fp8", "fp8")):
        layer = rounded(plain, precision, learn_step=False)
        assert layer.precision == f"{format}_weights"
        assert torch.equal(layer(torch.arange(20)), widened(plain.weight, format))


@pytest.mark.parametrize("learn_step", [False, True])
def test_an_embedding_takes_a_single_index(learn_step):
    layer = rounded(nn.Embedding(20, 16), "int8_weights", learn_step=learn_step)
    assert torch.equal(layer(torch.tensor(3)), layer(torch.tensor([3]))[0])
