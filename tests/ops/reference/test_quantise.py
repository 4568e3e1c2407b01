"""The reference cast against an independent one in float64, and what must hold of any cast."""

import math

import pytest
import torch

from deepseek_mp.ops.layouts import ALIGNMENT, padded_rows
from deepseek_mp.ops.operands import Cast
from deepseek_mp.ops.reference.product import dequantise
from deepseek_mp.ops.reference.quantise import quantise, quantise_delayed
from deepseek_mp.precision import FORMATS

FP8 = ["fp8_e4m3", "fp8_e5m2", "fp8_e4m3fnuz", "fp8_e5m2fnuz"]
GROUPS = {"tensor": None, "row": (1, None), "1x32": (1, 32), "1x128": (1, 128), "128x128": (128, 128)}
ETA = {"fp8_e4m3": 0.0265, "fp8_e5m2": 0.053}
"""Relative RMS error of normally distributed numbers."""


def cast(x, granularity, format="fp8_e4m3", power_of_two=False, columns=False):
    made = quantise(x, Cast(format, granularity, power_of_two, not columns, columns))
    return made[2:] if columns else made[:2]


def back(x, granularity, **options):
    values, scale = cast(x, granularity, **options)
    return dequantise(values, scale, granularity)[: x.shape[0]]


def exact_step(value, format):
    """Distance between neighbours of the format around |value|, in float64."""
    found = FORMATS[format]
    exponent = torch.floor(torch.log2(value.abs().double().clamp_min(found.smallest_normal)))
    return 2.0 ** (exponent - found.mantissa_bits)


def error(made, expected):
    return float((made.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("format", FP8)
@pytest.mark.parametrize("seed", range(3))
def test_values_are_the_nearest_of_the_format(granularity, format, seed):
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 1)
    values, scale = cast(x, granularity, format=format)
    whole = dequantise(torch.ones_like(values.float()), scale, granularity).double()
    scaled = x.double() / whole
    assert (values.double() - scaled).abs().le(exact_step(scaled, format) / 2 * (1 + 1e-5)).all()
    assert values.double().abs().max() == FORMATS[format].max


@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("format", ETA)
def test_the_error_of_normal_numbers_is_the_predicted_one(granularity, format):
    x = torch.randn(512, 512)
    measured = error(back(x, granularity, format=format), x)
    assert 0.9 * ETA[format] < measured < 1.1 * ETA[format]


@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("count", [256, 100, 1])
def test_the_transposed_layout_is_that_of_the_transposed_matrix(granularity, count):
    x = torch.randn(count, 256)
    padded = torch.zeros(padded_rows(count, granularity), 256)
    padded[:count] = x
    values, scale = cast(x, granularity, columns=True)
    expected, expected_scale = cast(padded.t().contiguous(), granularity)
    torch.testing.assert_close(values.float(), expected.float(), rtol=0, atol=0)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("count", [0, 1, 17, 129])
def test_added_rows_are_zeros(granularity, count):
    values, _ = cast(torch.randn(count, 256), granularity)
    assert values.shape[0] == padded_rows(count, granularity)
    assert not values[count:].float().any()


@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_zeros_stay_zeros(granularity, power_of_two):
    x = torch.randn(256, 256)
    x[3] = 0
    x[128:, :128] = 0
    assert not back(x, granularity, power_of_two=power_of_two)[3].any()
    everything = back(torch.zeros(128, 256), granularity, power_of_two=power_of_two)
    assert not everything.any()


@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_a_value_that_is_not_finite_is_nan_and_harms_no_other_row(granularity, power_of_two, bad):
    x = torch.randn(256, 256)
    x[5, 7] = bad
    clean = x.clone()
    clean[5, 7] = 0
    made, expected = (back(matrix, granularity, power_of_two=power_of_two) for matrix in (x, clean))
    assert made[5, 7].isnan()
    own = {"row": slice(0, 256), "1x32": slice(0, 32), "1x128": slice(0, 128)}.get(granularity, slice(7, 8))
    made[5, own] = expected[5, own]
    assert torch.equal(made, expected)


@pytest.mark.parametrize("granularity", ["row", "1x128", "1x32"])
def test_an_outlier_leaves_other_rows_alone(granularity):
    x = torch.randn(64, 256)
    spoiled = x.clone()
    spoiled[9, 30] *= 1000
    rows = torch.arange(64) != 9
    assert torch.equal(back(spoiled, granularity)[rows], back(x, granularity)[rows])


def test_rows_over_seven_decades_underflow_under_one_scale_only():
    x = torch.randn(512, 256) * 10.0 ** torch.linspace(-7, 0, 512)[:, None]
    lost = {name: float((back(x, name) == 0).float().mean()) for name in GROUPS}
    assert lost["tensor"] > 0.2
    assert lost["row"] < 0.01
    assert lost["1x128"] < 0.01


@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("tiny", [2.0**-149, 2.0**-133, 2.0**-126, 1e-30])
def test_scales_of_tiny_numbers_are_finite(granularity, tiny):
    x = torch.full((128, 128), tiny)
    values, scale = cast(x, granularity)
    assert scale.isfinite().all()
    assert (scale > 0).all()
    assert values.float().isfinite().all()
    if tiny >= 1e-30:
        assert error(dequantise(values, scale, granularity), x) < 0.04


@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("format", FP8)
def test_power_of_two_scales_are_powers_and_never_too_small(granularity, format):
    x = torch.randn(256, 256) * 10.0 ** (torch.rand(256, 1) * 20 - 10)
    values, scale = cast(x, granularity, format=format, power_of_two=True)
    mantissa, _ = torch.frexp(scale)
    assert (mantissa == 0.5).all()
    assert error(dequantise(values, scale, granularity), x) < 0.06
    plain = cast(x, granularity, format=format)[1]
    assert (scale >= plain).all()
    assert (scale < 2.001 * plain).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", ALIGNMENT)
def test_sixteen_bit_input_is_not_rounded_first(dtype, granularity):
    x = torch.randn(128, 128).to(dtype)
    assert torch.equal(back(x, granularity), back(x.float(), granularity))


def groups_of(granularity, outer, contraction):
    """Each group's place in the stored scales, and its rows and columns, one by one."""
    if granularity == "tensor":
        return [((), slice(None), slice(None))]
    if granularity == "row":
        return [((i,), slice(i, i + 1), slice(None)) for i in range(outer)]
    height, length = GROUPS[granularity]
    return [
        ((i, j) if height > 1 else (j, i), slice(i * height, (i + 1) * height), slice(j * length, (j + 1) * length))
        for i in range(outer // height)
        for j in range(contraction // length)
    ]


@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("format", FP8)
@pytest.mark.parametrize("columns", [False, True])
def test_each_scale_is_that_of_its_own_group(granularity, format, columns):
    x = torch.randn(128, 256) * 10.0 ** torch.linspace(-3, 3, 256)
    seen = x.t() if columns else x
    plain = cast(x, granularity, format=format, columns=columns)[1]
    powers = cast(x, granularity, format=format, columns=columns, power_of_two=True)[1]
    for place, rows, part in groups_of(granularity, *seen.shape):
        exact = float(seen[rows, part].abs().max()) / FORMATS[format].max
        assert abs(float(plain[place]) / exact - 1) < 2**-22
        power = 2.0 ** math.ceil(math.log2(exact))
        assert float(powers[place]) == power


@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("format", FP8)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_largest_numbers_of_fp32_keep_finite_scales_and_values(granularity, format, power_of_two):
    x = torch.full((128, 128), torch.finfo(torch.float32).max)
    values, scale = cast(x, granularity, format=format, power_of_two=power_of_two)
    assert scale.isfinite().all()
    stands_for = values.double() * float(scale.flatten()[0])
    assert (stands_for / x.double() - 1).abs().max() < 0.13


@pytest.mark.parametrize("granularity", GROUPS)
@pytest.mark.parametrize("format", FP8)
def test_negative_numbers_that_vanish_become_no_nan(granularity, format):
    """Minus zero, a number in OCP's formats, is the byte of NaN in the fnuz ones."""
    x = torch.full((128, 128), -1e-20)
    x[::32], x[:, ::32] = 1.0, 1.0  # one in every group of either layout
    x[3, 5] = -0.0
    for columns in (False, True):
        values, _ = cast(x, granularity, format=format, columns=columns)
        vanished = (x.t() if columns else x) <= 0
        assert (values.float()[vanished] == 0).all()


@pytest.mark.parametrize("format", FP8)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_no_maximum_is_cast_beyond_the_format(format, power_of_two, seed):
    """Every row has its own maximum; each becomes the largest value, or at least half of it under a power of two."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(4096, 16, generator=generator) * 10.0 ** (torch.rand(4096, 1, generator=generator) * 60 - 30)
    top = cast(x, "row", format=format, power_of_two=power_of_two)[0].float().amax(1)
    largest = FORMATS[format].max
    assert ((top > largest / 2.001) & (top <= largest)).all() if power_of_two else (top == largest).all()


# -- with a scale from the past --------------------------------------------------------------------------


def delayed(x, top, amax=0.0, format="fp8_e4m3", power_of_two=False):
    """What the op gives, and the maximum it leaves."""
    raised = torch.tensor(amax)
    return quantise_delayed(x, torch.tensor(top), raised, Cast(format, "tensor", power_of_two, True, True)), float(
        raised
    )


def same(ours, expected):
    return all(
        torch.equal(a.float().nan_to_num(7e7), b.float().nan_to_num(7e7)) for a, b in zip(ours, expected, strict=True)
    )


@pytest.mark.parametrize("format", FP8)
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("known", [False, True])
def test_the_tensors_own_maximum_known_before_or_not_known_gives_the_bits_of_tensor(format, power_of_two, known):
    for seed in range(20):
        x = torch.randn(40, 64, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 10)
        x[3, 5], x[4, 6] = float("inf"), float("nan")
        largest = float(x[x.isfinite()].abs().max())
        made, raised = delayed(x, largest if known else 0.0, format=format, power_of_two=power_of_two)
        assert same(made, quantise(x, Cast(format, "tensor", power_of_two, True, True)))
        assert raised == largest


@pytest.mark.parametrize("format", FP8)
def test_values_beyond_the_scale_become_the_largest_and_the_rest_stays(format):
    x = torch.rand(32, 32) - 0.5
    x[0, 0] = 0.5
    spoiled = x.clone()
    spoiled[1, 1], spoiled[2, 2], spoiled[3, 3] = 50.0, -3e38, float("inf")
    (q, s, qt, st), raised = delayed(spoiled, 0.5, format=format)
    (expected, scale, _, _), _ = delayed(x, 0.5, format=format)
    largest = FORMATS[format].max
    assert (q.float()[1, 1], q.float()[2, 2]) == (largest, -largest)
    assert q.float()[3, 3].isnan()
    for i in (1, 2, 3):
        q.view(torch.uint8)[i, i] = expected.view(torch.uint8)[i, i]
    assert torch.equal(q.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(s, scale)
    assert torch.equal(st, scale)
    assert qt.float()[1, 1] == largest
    assert raised == float(torch.tensor(3e38))


@pytest.mark.parametrize(("amax", "expected"), [(0.0, 2.0), (1.0, 2.0), (3.0, 3.0)])
def test_the_maximum_is_raised_and_never_lowered(amax, expected):
    x = torch.full((16, 16), -2.0)
    assert delayed(x, 1.0, amax)[1] == expected
    assert delayed(torch.full((16, 16), float("nan")), 1.0, amax)[1] == amax
    assert delayed(torch.zeros(0, 16), 1.0, amax)[1] == amax


@pytest.mark.parametrize("top", [2.0**-149, 2.0**-130, 3.4e38])
def test_extreme_maxima_keep_scales_and_values_finite(top):
    (q, s, _, _), _ = delayed(torch.full((16, 16), top), top)
    assert q.float().isfinite().all()
    assert s.isfinite()
    assert s > 0
