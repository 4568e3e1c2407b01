"""Rounding to formats by their own numbers: against PyTorch's casts, and against lists of the values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek_mp.errors import FormatError
from deepseek_mp.ops.cast import CASTABLE, cast
from deepseek_mp.ops.grid import keep_mantissa, nearest, round_to_format, spacing
from deepseek_mp.precision import FORMATS, Format

INF, NAN = float("inf"), float("nan")
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
OWN = {name: Format(**{**vars(FORMATS[name]), "name": f"my_{name}"}) for name in CASTABLE if name != "fp64"}
"""Formats that are known by their numbers only."""


def trying() -> Tensor:
    """Numbers of all magnitudes, with the powers of two, what lies halfway between values, and its neighbours."""
    powers = torch.exp2(torch.arange(-149.0, 128.0))
    halves = torch.cat([powers * (1 + i / 32) for i in range(32)])
    ends = (448.0, 464.0, 465.0, 480.0, 57344.0, 61440.0, 65504.0, 65519.9, 65520.0, 240.0, 248.0, 6.0, 7.0, 127.5)
    points = torch.cat([halves, torch.tensor(ends), torch.randn(500) * 100])
    near = [points, torch.nextafter(points, torch.tensor(INF)), torch.nextafter(points, torch.tensor(0.0))]
    some = torch.cat(near)
    return torch.cat([some, -some, torch.tensor([0.0, -0.0, INF, -INF, NAN, torch.finfo(torch.float32).max])])


def bits(x: Tensor) -> Tensor:
    """The bits of fp32 numbers, with one NaN."""
    return torch.where(x.isnan(), NAN, x).view(torch.int32)


@pytest.mark.parametrize("format", [*CASTABLE, *OWN.values()], ids=str)
def test_known_formats_round_as_their_casts(format: str | Format) -> None:
    x = trying()
    name = str(format).removeprefix("my_")
    assert torch.equal(bits(round_to_format(x, format)), bits(cast(x, name).tensor.float()))


def nearest_of(values: list[float], x: Tensor) -> Tensor:
    """The nearest of these non-negative values to |x|, of two equally near the one at an even place; signed as x."""
    held = torch.tensor(values, dtype=torch.float64)
    distance = (x.double().abs()[:, None] - held).abs()
    closest = distance == distance.amin(1, keepdim=True)
    even = closest & (torch.arange(len(values)) % 2 == 0)
    place = torch.where(even.any(1), even.float().argmax(1), closest.float().argmax(1))
    return held[place].float().copysign(x)


def test_fp4_has_eight_magnitudes_and_the_largest_takes_what_is_beyond() -> None:
    x = torch.cat([torch.linspace(-9, 9, 721), torch.tensor([1e-40, 1e6])])
    got = round_to_format(x, "fp4_e2m1")
    assert torch.equal(got, nearest_of(E2M1, x))
    assert got.abs().unique().tolist() == E2M1
    assert round_to_format(torch.tensor([INF, -INF, NAN]), "fp4_e2m1").isnan().all()


@pytest.mark.parametrize(("name", "largest"), [("int8", 127), ("int4", 7)])
def test_integers_are_rounded_to_whole_numbers(name: str, largest: int) -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -3.5, -0.2, 1e9, -1e9, INF])
    got = round_to_format(x, name)
    assert got[:-1].tolist() == [0.0, 2.0, 2.0, 0.0, -4.0, 0.0, largest, -largest]
    assert got[3].signbit().logical_not()
    assert spacing(x, FORMATS[name]).unique().tolist() == [1.0]


def test_the_scale_format_has_powers_of_two_only() -> None:
    x = torch.tensor([1.0, 1.49, 1.5, 3.1, 0.0, 2.0**-127, 1e-45, 2.0**127, -1.0, INF])
    got = round_to_format(x, "e8m0")
    assert got[:-2].tolist() == [1.0, 1.0, 2.0, 4.0, 2.0**-127, 2.0**-127, 2.0**-127, 2.0**127]
    assert got[-2:].isnan().all()


def test_wide_formats_leave_numbers_as_they_are_and_types_stay() -> None:
    x = torch.randn(50, dtype=torch.float64)
    assert torch.equal(round_to_format(x, "fp64"), x)
    assert torch.equal(round_to_format(x, "fp32"), x.float().double())
    assert round_to_format(x.half(), "fp4_e2m1").dtype is torch.float16
    assert torch.equal(round_to_format(x.bfloat16(), "fp32"), x.bfloat16())
    with pytest.raises(FormatError, match="unknown format 'fp5'"):
        round_to_format(x, "fp5")


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "bf16"])
def test_spacing_is_the_distance_to_the_next_value(name: str) -> None:
    found = FORMATS[name]
    x = torch.cat([torch.rand(200) * found.max, torch.rand(200) * found.smallest_normal])
    below = nearest(x, found)
    above = nearest((below + spacing(below, found)).clamp_max(found.max), found)
    assert torch.equal(above - below, torch.where(below < found.max, spacing(below, found), 0.0))
    assert torch.equal(spacing(-x, found), spacing(x, found))


@pytest.mark.parametrize(("name", "kept"), [("tf32", 10), ("hf32", 11), ("bf16", 7)])
def test_mantissas_are_cut_to_the_nearest_even(name: str, kept: int) -> None:
    x = trying()
    assert torch.equal(bits(keep_mantissa(x, kept)), bits(cast(x, name).tensor.float()))
    ulp = 2.0**-kept
    ties = torch.tensor([1 + ulp / 2, 1 + 3 * ulp / 2, -(1 + ulp / 2)])
    assert keep_mantissa(ties, kept).tolist() == [1.0, 1 + 2 * ulp, -1.0]
