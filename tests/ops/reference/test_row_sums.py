"""The sums of rounding errors, each by its definition, value by value."""

import math

import pytest
import torch

from deepseek_mp.ops.reference.row_sums import row_sums
from deepseek_mp.ops.statistics import ROW_FIELDS

X = [3.0, -0.5, 0.0, 1e-3, -1e-3, math.inf, math.nan, 70000.0]
Q = [3.5, -0.5, 0.0, 0.0, -3e-3, math.inf, math.nan, math.inf]


def expected():
    pairs = [(x, q) for x, q in zip(X, Q, strict=True) if math.isfinite(x) and math.isfinite(q)]
    ratios = [(x, min(1.0, max(-1.0, (q - x) / x))) for x, q in pairs if x]
    return {
        "error": sum((q - x) ** 2 for x, q in pairs),
        "energy": sum(x * x for x, _ in pairs),
        "ratio": sum(ratio for _, ratio in ratios),
        "ratio_square": sum(ratio**2 for _, ratio in ratios),
        "side": sum(math.copysign(1.0, x) * ratio for x, ratio in ratios),
        "nonzero": len(ratios),
        "underflow": sum(x != 0 and q == 0 for x, q in pairs),
        "overflow": 1,
        "finite": 6,
        "size": sum(abs(x) for x, _ in pairs),
        "rounded_size": sum(abs(q) for _, q in pairs),
    }


@pytest.mark.parametrize("name", ROW_FIELDS)
def test_a_sum_is_that_of_its_definition(name):
    found = row_sums(torch.tensor([X, X]), torch.tensor([Q, X]))
    assert found.shape == (2, len(ROW_FIELDS))
    assert found[0, ROW_FIELDS.index(name)].item() == pytest.approx(expected()[name], rel=1e-6)


def test_several_ways_and_a_view_that_is_turned():
    x = torch.randn(6, 5)
    ways = torch.stack([x.bfloat16().float(), torch.zeros_like(x)])
    assert torch.equal(row_sums(x, ways), torch.stack([row_sums(x, way) for way in ways]))
    turned = row_sums(x.t(), ways.transpose(1, 2))
    assert torch.allclose(turned, row_sums(x.t().contiguous(), ways.transpose(1, 2).contiguous()))
