"""Attention of few queries in plain PyTorch, against PyTorch's own in FP64."""

from __future__ import annotations

import pytest
import torch
from attention_cases import CASES, MASKS, Case, exact, least_mask, mask_of, operands
from torch.nn import functional as F

from deepseek_mp.ops.few_query_attention import few_query_attention

CLOSE = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Half of a result's last bit; the sums before it are of fp32."""


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", CASES)
def test_it_is_pytorch_s_attention(name, kind, dtype):
    case = CASES[name]
    query, key, value = operands(case, dtype)
    mask = mask_of(kind, case, dtype)
    found = few_query_attention(query, key, value, mask, 0.3, implementation="reference")
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), exact(query, key, value, mask, 0.3), rtol=CLOSE[dtype], atol=1e-5)


def test_a_query_that_sees_nothing_gets_what_pytorch_gives_it():
    query, key, value = operands(Case(), torch.float32)
    for mask in (torch.zeros(300, dtype=torch.bool), torch.full((300,), -torch.inf)):
        found = few_query_attention(query, key, value, mask, 0.1, implementation="reference")
        expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[None])
        assert torch.equal(found, expected)
        assert torch.equal(found, torch.zeros_like(found))


def test_a_query_that_nearly_sees_nothing_gets_the_mean():
    """Some models hide keys by the least number of their dtype instead of infinity."""
    query, key, value = operands(Case(), torch.float32)
    found = few_query_attention(query, key, value, least_mask(300), 0.1, implementation="reference")
    torch.testing.assert_close(found, value.mean(2, keepdim=True))


@pytest.mark.parametrize(("batch", "queries", "keys"), [(0, 1, 300), (2, 0, 300), (2, 1, 0), (0, 0, 0)])
def test_nothing_at_all(batch, queries, keys):
    query, key, value = operands(Case(batch=batch, queries=queries, keys=keys), torch.float32)
    found = few_query_attention(query, key, value, None, 0.1, implementation="reference")
    assert torch.equal(found, torch.zeros(batch, 2, queries, 64))


def test_what_is_not_finite_stays_where_it_is():
    query, key, value = operands(Case(batch=2), torch.float32)
    key[1, 0, 7, 3] = torch.nan
    found = few_query_attention(query, key, value, None, 0.1, implementation="reference")
    assert found.isfinite().all(3).all(2).tolist() == [[True, True], [False, True]]
