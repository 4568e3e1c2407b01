"""The block of numbers of a tensor is what `ops` gives for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deepseek_mp.monitor.measure import WIDTH, block, largest_magnitude
from deepseek_mp.ops.rounding import rounded
from deepseek_mp.ops.statistics import ERROR_FIELDS, SPREAD_FIELDS, rounding_error, spread
from deepseek_mp.precision import RECIPES, Rounding
from deepseek_mp.precision.recipe import OperandRecipe

WAYS = [OperandRecipe(format="fp32"), OperandRecipe(format="fp16"), *(RECIPES[n].fprop.left for n in ("row", "nvfp4"))]


def never() -> Tensor:
    raise AssertionError("only one scale for the whole tensor needs its largest magnitude")


def test_lines_are_the_spread_and_the_errors_of_each_way() -> None:
    rows = torch.randn(16, 48) * 1e-3
    found = block(rows, WAYS, never)
    assert found.shape == (1 + len(WAYS), WIDTH)
    assert torch.equal(found[0, : len(SPREAD_FIELDS)], spread(rows))
    for line, side in zip(found[1:], WAYS, strict=True):
        assert torch.equal(line[: len(ERROR_FIELDS)], rounding_error(rows, rounded(rows, side)))
        assert not line[len(ERROR_FIELDS) :].any()
    assert not found[1].any()
    assert (found[2:, 0] > 0).all()


def test_a_narrow_tensor_is_measured_in_fp32() -> None:
    rows = torch.randn(8, 32).bfloat16()
    assert block(rows, WAYS, never).dtype == torch.float32
    assert not block(rows, [OperandRecipe(format="bf16")], never)[1].any()  # as it arrived


def test_one_scale_for_the_tensor_holds_what_was_not_sampled() -> None:
    whole = torch.randn(100, 32)
    whole[50, 3] = 1e4
    side = RECIPES["tensor"].fprop.left
    expected = rounding_error(whole[:8], rounded(whole, side)[:8])
    assert torch.equal(block(whole[:8], [side], lambda: largest_magnitude(whole))[1, : len(ERROR_FIELDS)], expected)
    assert expected[3] > 0  # small values underflow because of a row that is not among the sampled


def test_random_rounding_takes_nothing_from_the_model_s_random_numbers() -> None:
    side = replace(RECIPES["row"].dgrad.left, rounding=Rounding.STOCHASTIC)
    before = torch.get_rng_state()
    found = block(torch.randn(8, 32, generator=torch.Generator()), [side], never)
    assert torch.equal(torch.get_rng_state(), before)
    assert found[1, 0] > 0


@pytest.mark.parametrize("rows", [torch.zeros(0, 4), torch.zeros(3, 0), torch.zeros(3, 4)])
def test_nothing_gives_zeros(rows: Tensor) -> None:
    assert not block(rows, WAYS, never).any()
    assert block(rows, WAYS, never).shape == (1 + len(WAYS), WIDTH)


def test_the_largest_magnitude() -> None:
    assert largest_magnitude(torch.tensor([[1.0, -3.0]])) == 3
    assert largest_magnitude(torch.tensor([1.0, float("nan")])) == 0  # the sample's own counts then
    assert largest_magnitude(torch.zeros(0)) == 0
    assert largest_magnitude(torch.ones(2, dtype=torch.float64)).dtype == torch.float32


def test_squares_beyond_the_range_of_fp32_give_no_nan() -> None:
    assert block(torch.full((2, 4), 1e30), WAYS, never).isfinite().all()
