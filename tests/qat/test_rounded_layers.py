"""Rounded layers share the parameters of those that they replace, and compute with the stored values."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepseek_mp.ops.weight_only import quantised_weight
from deepseek_mp.qat.rounded_layers import rounded, rounded_layers


def widened(weight, format):
    q, scale = quantised_weight(weight, format)
    return q.float() * scale[:, None]


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_multiplies_the_stored_weight(format, bias):
    plain = nn.Linear(16, 8, bias=bias)
    layer, x = rounded(plain, format, learn_step=False), torch.randn(2, 3, 16)
    assert torch.equal(layer(x), F.linear(x, widened(plain.weight, format), plain.bias))
    assert layer.weight is plain.weight
    assert list(layer.state_dict()) == list(plain.state_dict())
    layer(x).square().sum().backward()
    assert all(param.grad is not None for param in plain.parameters())
    q, scale = layer.kept()
    expected = quantised_weight(plain.weight, format)
    assert torch.equal(q.float(), expected[0].float())
    assert torch.equal(scale, expected[1])


@pytest.mark.parametrize("learn_step", [False, True])
def test_an_embedding_gives_rows_of_the_stored_table(learn_step):
    plain = nn.Embedding(20, 16, padding_idx=3)
    layer, index = rounded(plain, "int8", learn_step=learn_step), torch.tensor([[1, 3, 19], [1, 0, 7]])
    q, scale = layer.kept()
    assert torch.equal(layer(index), F.embedding(index, q.float() * scale[:, None]))
    assert learn_step or torch.equal(layer(index), F.embedding(index, widened(plain.weight, "int8")))
    layer(index).sum().backward()
    assert not plain.weight.grad[[2, 3]].any()
    assert plain.weight.grad[1].any()
    if learn_step:
        assert set(layer.step.grad.nonzero().flatten().tolist()) <= {0, 1, 3, 7, 19}


def test_the_mode_stays_and_all_are_found():
    plain = nn.Linear(4, 4).eval()
    model = nn.Sequential(nn.Linear(4, 4), rounded(plain, "int8", learn_step=True))
    assert list(rounded_layers(model)) == ["1"]
    assert not model[1].training
    assert list(dict(model[1].named_parameters())) == ["weight", "bias", "step"]
