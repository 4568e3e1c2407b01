"""The reference product against float64."""

import pytest
import torch

from deepseek_mp.ops.operands import Cast
from deepseek_mp.ops.reference.product import dequantise, product
from deepseek_mp.ops.reference.quantise import quantise

PAIRS = [("tensor", "tensor"), ("row", "row"), ("1x128", "128x128"), ("1x128", "1x128"), ("1x32", "1x32")]


def operands(pair, outer, contraction, inner, scale=1.0):
    left, right = torch.randn(outer, contraction) * scale, torch.randn(inner, contraction)
    made = (
        *quantise(left, Cast("fp8_e4m3", pair[0], False, True, False))[:2],
        *quantise(right, Cast("fp8_e4m3", pair[1], False, True, False))[:2],
    )
    return made, left.double() @ right.double().t()


def error(made, exact):
    return float((made.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("contraction", [128, 1024, 16384])
def test_the_error_is_that_of_the_operands_however_long_the_sum(pair, contraction):
    quantised, exact = operands(pair, 128, contraction, 128)
    predicted = 0.0265 * 2**0.5
    assert error(product(*quantised, pair, None, torch.float32), exact) < 1.1 * predicted


@pytest.mark.parametrize("pair", PAIRS)
def test_it_is_the_product_of_what_the_operands_stand_for(pair):
    (left, ls, right, rs), _ = operands(pair, 128, 256, 128, scale=1e-3)
    exact = dequantise(left, ls, pair[0]).double() @ dequantise(right, rs, pair[1]).double().t()
    assert error(product(left, ls, right, rs, pair, None, torch.float32), exact) < 1e-6


def test_a_bias_is_added_to_every_row():
    quantised, _ = operands(("row", "row"), 16, 64, 32)
    bias = torch.randn(32)
    without = product(*quantised, ("row", "row"), None, torch.float32)
    assert torch.allclose(product(*quantised, ("row", "row"), bias, torch.float32), without + bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_result_has_the_type_asked_for_also_inside_autocast(dtype):
    quantised, _ = operands(("1x128", "128x128"), 128, 128, 128)
    outside = product(*quantised, ("1x128", "128x128"), None, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        inside = product(*quantised, ("1x128", "128x128"), None, dtype)
    assert inside.dtype is outside.dtype is dtype
    assert torch.equal(inside, outside)


def test_sums_over_nothing_are_zero():
    left, right = torch.empty(16, 0, dtype=torch.float8_e4m3fn), torch.empty(32, 0, dtype=torch.float8_e4m3fn)
    one = torch.tensor(1.0)
    assert torch.equal(product(left, one, right, one, ("tensor", "tensor"), None, torch.float32), torch.zeros(16, 32))


@pytest.mark.parametrize("pair", PAIRS)
def test_added_rows_change_no_product(pair):
    """Of fprop they are rows of the result, of wgrad they are zeros in the sum."""
    x, y, count = torch.randn(100, 256), torch.randn(100, 128), 100
    q, s, qt, st = quantise(x, Cast("fp8_e4m3", pair[0], False, True, True))
    weight = quantise(torch.randn(128, 256), Cast("fp8_e4m3", pair[1], False, True, False))[:2]
    whole = product(q, s, *weight, pair, None, torch.float32)
    plain = dequantise(q, s, pair[0])[:count] @ dequantise(*weight, pair[1]).t()
    torch.testing.assert_close(whole[:count], plain, rtol=1e-5, atol=1e-4)
    assert not whole[count:].any()
    _, _, yt, yst = quantise(y, Cast("fp8_e4m3", pair[0], False, False, True))
    summed = product(yt, yst, qt, st, (pair[0], pair[0]), None, torch.float32)
    assert error(summed, y.double().t() @ x.double()) < 1.1 * 0.0265 * 2**0.5


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_value_that_is_not_finite_spoils_its_own_row_only(pair, bad):
    x, weight = torch.randn(128, 256), torch.randn(128, 256)
    right = quantise(weight, Cast("fp8_e4m3", pair[1], False, True, False))[:2]
    x[7, 3] = 0
    clean = product(*quantise(x, Cast("fp8_e4m3", pair[0], False, True, False))[:2], *right, pair, None, torch.float32)
    x[7, 3] = bad
    made = product(*quantise(x, Cast("fp8_e4m3", pair[0], False, True, False))[:2], *right, pair, None, torch.float32)
    assert made[7].isnan().all()
    others = torch.arange(128) != 7
    assert torch.equal(made[others], clean[others])
