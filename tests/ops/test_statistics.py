"""Numbers that describe a tensor and its rounding, against their definitions."""

import pytest
import torch

from deepseek_mp.ops.grid import round_to_format
from deepseek_mp.ops.statistics import (
    ERROR_FIELDS,
    SPREAD_FIELDS,
    balanced,
    comparison,
    ideal_error,
    of_product,
    rounding_error,
    spread,
)
from deepseek_mp.precision import FORMATS


def named(fields, vector):
    return dict(zip(fields, vector.tolist(), strict=True))


def errors(x, rounded):
    return named(ERROR_FIELDS, rounding_error(x, rounded))


def test_bf16_of_normal_values_has_the_error_of_its_format():
    x = torch.randn(512, 256)
    found = errors(x, x.bfloat16())
    assert found["relative"] == pytest.approx(2.8e-6, rel=0.05)  # 2^-16 of mantissa steps, averaged over a binade
    assert found["by_row"] == pytest.approx(found["relative"], rel=0.05)
    assert abs(found["bias"]) < 1e-4
    assert found["underflow"] == found["overflow"] == 0


def test_rows_of_small_values_are_seen_by_row_only():
    x = torch.randn(64, 32)
    x[1:] *= 1e-6
    rounded = x.clone()
    rounded[1:] = 0
    found = errors(x, rounded)
    assert found["relative"] < 1e-9
    assert found["by_row"] == pytest.approx(63 / 64)
    assert found["underflow"] == pytest.approx(63 / 64)


def test_small_values_between_large_ones_are_seen_by_the_bias_only():
    x = torch.full((8, 100), 1e-5)
    x[:, 0] = 1.0
    rounded = torch.zeros_like(x)
    rounded[:, 0] = 1.0
    found = errors(x, rounded)
    assert found["by_row"] < 1e-6
    assert found["bias"] == pytest.approx(-0.99)
    assert found["lean"] == pytest.approx(0.99, rel=0.02)
    assert found["mass"] == pytest.approx(-99e-5, rel=0.01)


def test_errors_of_both_signs_lean_to_no_side():
    x = 1e-5 * torch.randn(64, 100).sign()
    x[:, 0] = 1.0
    rounded = torch.zeros_like(x)
    rounded[:, 0] = 1.0
    found = errors(x, rounded)
    assert found["bias"] == pytest.approx(-0.99)
    assert found["lean"] < 0.05  # chance alone would make it 0.1


def test_half_of_the_magnitude_is_missing():
    assert errors(torch.ones(4, 4), torch.full((4, 4), 0.5))["mass"] == pytest.approx(-0.5)
    assert errors(-torch.ones(4, 4), torch.full((4, 4), -1.5))["mass"] == pytest.approx(0.5)
    assert errors(torch.zeros(4, 4), torch.zeros(4, 4))["mass"] == 0


def test_columns_that_are_lost_are_seen_where_they_are_asked_for():
    x = torch.ones(8, 4)
    x[:, 1:] = 1e-6
    rounded = x * (x > 0.5)
    assert errors(x, rounded)["by_row"] < 1e-6
    _, rows, columns = comparison(x, rounded[None])
    assert balanced(rows).item() < 1e-6
    assert balanced(columns).item() == pytest.approx(0.75)


def test_what_is_lost_counts_by_what_it_is_multiplied_with():
    x = torch.ones(8, 4)
    x[:, 1:] = 1e-3
    columns = comparison(x, (x * (x > 0.5))[None]).columns
    alike, against = torch.ones(4), torch.tensor([1e-6, 1.0, 1.0, 1.0])
    assert of_product(columns, alike).item() == pytest.approx(3e-6, rel=1e-3)
    assert of_product(columns, against).item() == pytest.approx(0.75)
    assert of_product(columns, torch.zeros(4)).item() == 0


def test_what_overflows_is_counted_and_spoils_nothing_else():
    x = torch.tensor([[1.0, 70000.0, float("nan"), float("inf")]])
    found = errors(x, x.half())
    assert found["overflow"] == pytest.approx(0.5)
    assert found["relative"] == 0
    assert found["bias"] == 0


def test_several_ways_of_rounding_at_once_are_each_of_them():
    x = torch.randn(32, 16) * 10.0 ** torch.randint(-9, 6, (32, 16))
    x[3, 4] = float("inf")
    ways = torch.stack([x.bfloat16().float(), x.half().float(), torch.zeros_like(x)])
    assert torch.equal(rounding_error(x, ways), torch.stack([rounding_error(x, way) for way in ways]))


@pytest.mark.parametrize("x", [torch.zeros(3, 4), torch.zeros(0, 4), torch.full((2, 2), float("nan"))])
def test_nothing_to_say_is_zero(x):
    assert not rounding_error(x, x).any()


def test_the_spread_of_known_values():
    found = named(SPREAD_FIELDS, spread(torch.tensor([0.0, 2.0, -8.0, float("inf")])))
    square = (0 + 4 + 64) / 3
    assert found["amax"] == 8
    assert found["rms"] == pytest.approx(square**0.5)
    assert found["smallest"] == 2
    assert found["octaves"] == 2
    assert found["kurtosis"] == pytest.approx((16 + 4096) / 3 / square**2)
    assert found["non_finite"] == 0.25


def test_normal_values_have_a_kurtosis_of_three_and_outliers_show():
    x = torch.randn(200_000)
    assert named(SPREAD_FIELDS, spread(x))["kurtosis"] == pytest.approx(3, rel=0.05)
    x[::1000] *= 1000
    assert named(SPREAD_FIELDS, spread(x))["kurtosis"] > 100


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_fourth_power_neither_overflows_nor_vanishes(scale):
    found = named(SPREAD_FIELDS, spread(torch.randn(10_000) * scale))
    assert found["kurtosis"] == pytest.approx(3, rel=0.2)
    assert found["rms"] == pytest.approx(scale, rel=0.05)


@pytest.mark.parametrize("x", [torch.zeros(5), torch.zeros(0), torch.full((3,), float("nan"))])
def test_the_spread_of_nothing_is_finite(x):
    found = named(SPREAD_FIELDS, spread(x))
    assert found["amax"] == found["kurtosis"] == found["octaves"] == 0
    assert found["non_finite"] == float(x.isnan().any())


@pytest.mark.parametrize("format", ["tf32", "bf16", "fp16", "fp8_e4m3", "fp8_e5m2"])
@pytest.mark.parametrize("deviation", [1.0, 1.4])
def test_the_ideal_error_is_that_of_normal_values(format, deviation):
    x = torch.randn(1000, 1000) * deviation
    assert errors(x, round_to_format(x, format))["relative"] == pytest.approx(ideal_error(FORMATS[format]), rel=0.05)
