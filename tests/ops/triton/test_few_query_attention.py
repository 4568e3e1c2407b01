"""Attention of few queries by Triton, against PyTorch's in FP64.

With TRITON_INTERPRET=1 in the environment it runs on a CPU, where Triton is installed. The interpreter cuts numbers off
where BF16 is to be rounded to, and multiplies the bits of BF16 matrices as whole numbers.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from attention_cases import CASES, MASKS, Case, exact, least_mask, mask_of, operands

from deepseek_mp.errors import ConfigError
from deepseek_mp.ops.few_query_attention import few_query_attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
CLOSE = {torch.float16: 2**-10, torch.bfloat16: 2**-7}
"""Of a result, and of the largest of the values that it is a mean of, whose weights may be rounded."""


@pytest.fixture(autouse=True)
def loops_of_any_length(monkeypatch):
    """Triton 3.6's interpreter takes a loop's end from an array, which NumPy 2.4 no longer makes a number of."""
    if INTERPRETED:
        from triton.runtime import interpreter

        patch = interpreter._patch_lang_tensor

        def patched(tensor, scope):
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

        monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)


def agree(case, kind, dtype, scale=0.2):
    query, key, value = operands(case, dtype, DEVICE)
    mask = mask_of(kind, case, dtype, DEVICE)
    found = few_query_attention(query, key, value, mask, scale, implementation="triton")
    expected = exact(query, key, value, mask, scale)
    assert found.dtype is dtype
    torch.testing.assert_close(found.cpu().double(), expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", CASES)
def test_it_is_pytorch_s_attention(name, kind):
    if INTERPRETED and kind not in ("none", "heads") and name not in ("one query", "groups and queries"):
        pytest.skip("takes long where kernels are interpreted")
    agree(CASES[name], kind, torch.float16)


@pytest.mark.parametrize("kind", ["none", "heads", "added"])
@pytest.mark.parametrize("name", ["one query", "part of a cache"])
def test_bf16(name, kind):
    agree(CASES[name], kind, torch.bfloat16)


def test_scores_of_any_size():
    for scale in (30.0, 1e-4, -0.5):
        agree(Case(keys=200), "heads", torch.float16, scale)
        agree(Case(keys=200, queries=3), "heads", torch.float16, scale)


@pytest.mark.parametrize("queries", [1, 2])
def test_a_query_that_nearly_sees_nothing_gets_the_mean(queries):
    """Some models hide keys by the least number of their dtype instead of infinity."""
    query, key, value = operands(Case(queries=queries), torch.float16, DEVICE)
    found = few_query_attention(query, key, value, least_mask(300, DEVICE), 0.2, implementation="triton")
    mean = value.float().mean(2, keepdim=True).expand_as(found)
    torch.testing.assert_close(found.float(), mean, rtol=2**-10, atol=2**-10)


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("queries", [1, 2])
def test_what_no_query_sees_is_not_read(queries, alike):
    query, key, value = operands(Case(queries=queries), torch.float16, DEVICE)
    seen = (torch.arange(300, device=DEVICE) < 100).expand(queries, 300)
    seen = seen if alike else seen.contiguous()
    expected = exact(query, key[:, :, :100], value[:, :, :100], None, 0.2)
    key[:, :, 100:], value[:, :, 100:] = torch.nan, torch.inf
    found = few_query_attention(query, key, value, seen, 0.2, implementation="triton")
    torch.testing.assert_close(found.cpu().double(), expected, rtol=2**-10, atol=2**-10)


@pytest.mark.parametrize("queries", [1, 2])
def test_what_is_not_finite_stays_where_it_is(queries):
    query, key, value = operands(Case(batch=2, queries=queries), torch.float16, DEVICE)
    key[1, 0, 7, 3] = torch.nan
    found = few_query_attention(query, key, value, None, 0.1, implementation="triton")
    assert found.isfinite().all(3).all(2).tolist() == [[True, True], [False, True]]


def test_values_that_are_apart_in_memory_and_empty_batches():
    query, key, value = operands(Case(), torch.float16, DEVICE)
    apart = key.transpose(2, 3).contiguous().transpose(2, 3)
    found = few_query_attention(query, apart, value, None, 0.2, implementation="triton")
    torch.testing.assert_close(found.cpu().double(), exact(query, key, value, None, 0.2), rtol=2**-10, atol=2**-10)
    assert few_query_attention(query[:0], key[:0], value[:0], None, 0.2, implementation="triton").shape == (0, 2, 1, 64)


def test_operands_in_fp32_are_for_the_reference():
    with pytest.raises(ConfigError, match=r"attention in torch\.float32 by the Triton kernel"):
        few_query_attention(*operands(Case(), torch.float32, DEVICE), None, 0.1, implementation="triton")


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_parts_are_alike_and_fill_the_processors():
    from deepseek_mp.ops.triton.few_query_attention import cut

    assert cut(32, 1, 1024, 128, 132).parts == 8  # 16 blocks of 64
    assert cut(32, 1, 1024, 128, 132).positions == 64
    assert cut(256, 1, 1024, 128, 132).parts == 2
    assert cut(512, 1, 1 << 20, 128, 132).parts == 1
    assert cut(1, 8, 1 << 20, 128, 132).parts == 128
    assert cut(8, 4, 1024, 128, 132).parts == 16
    assert cut(1, 128, 1024, 128, 132).rows == 64
    assert [cut(8, rows, 1024, 128, 132).warps for rows in (1, 2, 16, 17)] == [8, 4, 4, 8]
    for keys in (0, 1, 63, 64, 65, 5000):
        for heads in (1, 7, 40):
            plan = cut(heads, 1, keys, 128, 132)
            blocks = max(1, -(-keys // plan.positions))
            assert 1 <= plan.parts <= blocks
            assert plan.parts - 1 < blocks / -(-blocks // plan.parts) <= plan.parts
