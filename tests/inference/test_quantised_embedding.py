"""The embedding gives the rows of its table, widened."""

from __future__ import annotations

import pickle

import pytest
import torch

from deepseek_mp.inference.quantised_embedding import QuantisedEmbedding
from deepseek_mp.ops.weight_only import quantised_weight


def test_rows_are_those_of_the_widened_table():
    table = torch.randn(10, 8)
    q, scale = quantised_weight(table, "int8")
    layer, index = QuantisedEmbedding(q, scale, torch.bfloat16), torch.tensor([[0, 9], [3, 3]])
    found = layer(index)
    assert found.shape == (2, 2, 8)
    assert torch.equal(found, (q.float() * scale[:, None])[index].bfloat16())
    assert {name: tensor.dtype for name, tensor in layer.state_dict().items()} == {
        "q": torch.int8,
        "scale": torch.float32,
    }


def test_indices_that_are_none_are_refused():
    layer = QuantisedEmbedding(*quantised_weight(torch.randn(10, 8), "fp8"), torch.bfloat16)
    for index in (-1, 10):
        with pytest.raises((IndexError, RuntimeError), match="out of range"):
            layer(torch.tensor([index]))


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_a_table_comes_back_from_a_pickle(format):
    layer, index = QuantisedEmbedding(*quantised_weight(torch.randn(10, 8), format), torch.bfloat16), torch.arange(10)
    found = pickle.loads(pickle.dumps(layer))
    assert torch.equal(found(index), layer(index))
    assert found.state_dict()["q"].dtype is layer.q.dtype
