"""Calls of attention that are taken over, all that stay, and the region in which eager calls are ours."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from deepseek_mp.nn.attention_calls import FewQueryCalls, taken_over

BF16 = torch.bfloat16


def operand(heads=4, length=300, width=16, *, batch=2, dtype=BF16):
    return torch.randn(batch, heads, length, width).to(dtype)


QUERY, KEY, VALUE = operand(length=1), operand(), operand()
SEEN = torch.rand(1, 1, 1, 300) < 0.5


def chosen(device, dtype, width):
    return "reference" if dtype is BF16 and width <= 32 else None


def ours(*args, **kwargs):
    return taken_over(args, kwargs, lambda leaf: leaf, chosen)


def test_a_masked_call_is_taken_over_however_it_is_spelled():
    expected = (QUERY, KEY, VALUE, SEEN, 0.25, "reference")
    for found in (
        ours(QUERY, KEY, VALUE, SEEN),
        ours(QUERY, KEY, VALUE, SEEN, 0.0, False),
        ours(query=QUERY, key=KEY, value=VALUE, attn_mask=SEEN, dropout_p=0, enable_gqa=True),
    ):
        assert all(left is right for left, right in zip(found[:4], expected[:4], strict=True))
        assert found[4:] == expected[4:]
    assert ours(QUERY, KEY, VALUE, SEEN, scale=2)[4] == 2.0
    assert ours(QUERY, KEY[:, :2], VALUE[:, :2], SEEN, enable_gqa=True) is not None


STAYING = {
    "no mask": lambda: ours(QUERY, KEY, VALUE),
    "causal": lambda: ours(QUERY, KEY, VALUE, is_causal=True),
    "causal and masked": lambda: ours(QUERY, KEY, VALUE, SEEN, is_causal=True),
    "dropout": lambda: ours(QUERY, KEY, VALUE, SEEN, 0.1),
    "an argument of a later release": lambda: ours(QUERY, KEY, VALUE, SEEN, window=3),
    "three dimensions": lambda: ours(QUERY[0], KEY[0], VALUE[0], SEEN[0]),
    "many queries": lambda: ours(operand(length=17), KEY, VALUE, SEEN),
    "few keys": lambda: ours(QUERY, KEY[:, :, :255], VALUE[:, :, :255], SEEN[..., :255]),
    "heads that are not grouped": lambda: ours(QUERY, KEY[:, :1], VALUE[:, :1], SEEN),
    "heads of no whole groups": lambda: ours(QUERY, KEY[:, :3], VALUE[:, :3], SEEN, enable_gqa=True),
    "no heads of keys": lambda: ours(QUERY, KEY[:, :0], VALUE[:, :0], SEEN, enable_gqa=True),
    "a batch that is broadcast": lambda: ours(QUERY, KEY[:1], VALUE[:1], SEEN),
    "another type": lambda: ours(QUERY, KEY, VALUE.half(), SEEN),
    "no implementation": lambda: ours(QUERY.float(), KEY.float(), VALUE.float(), SEEN),
    "wide values": lambda: ours(QUERY, KEY, operand(width=64), SEEN),
    "values apart in memory": lambda: ours(QUERY, KEY, VALUE.mT.contiguous().mT, SEEN),
    "another device": lambda: ours(QUERY, KEY, VALUE, SEEN.to("meta")),
    "a scale that is a tensor": lambda: ours(QUERY, KEY, VALUE, SEEN, scale=torch.tensor(0.1)),
    "a gradient": lambda: ours(QUERY, KEY, VALUE.clone().requires_grad_(), SEEN),
}


@pytest.mark.parametrize("name", STAYING)
def test_all_others_stay(name):
    assert STAYING[name]() is None


def test_a_gradient_that_nobody_takes_does_not_matter():
    with torch.no_grad():
        assert ours(QUERY, KEY, VALUE.clone().requires_grad_(), SEEN) is not None


class Counted(FewQueryCalls):
    """Counts the calls that are ours."""

    def __init__(self):
        super().__init__(self.choose)
        self.taken = 0

    def choose(self, device, dtype, width):
        self.taken += 1
        return "reference"


def test_calls_in_the_region_are_ours_and_give_the_same():
    with Counted() as region:
        found = F.scaled_dot_product_attention(QUERY, KEY, VALUE, SEEN)
        F.scaled_dot_product_attention(QUERY, KEY, VALUE)
        assert (KEY + VALUE).shape == KEY.shape
    assert region.taken == 1
    expected = F.scaled_dot_product_attention(QUERY, KEY, VALUE, SEEN)
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)
    assert region.taken == 1
