"""Rounding to operand recipes: FP8 against the reference, NVFP4 against its definition, short groups, bad values."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deepseek_mp.errors import FormatError, ShapeError
from deepseek_mp.ops.cast import FP8
from deepseek_mp.ops.layouts import ALIGNMENT
from deepseek_mp.ops.operands import Cast
from deepseek_mp.ops.reference.product import dequantise
from deepseek_mp.ops.reference.quantise import quantise
from deepseek_mp.ops.rounding import factored, fits_bf16, rounded
from deepseek_mp.precision import FORMATS, GRANULARITIES, RECIPES, Granularity, Rounding, ScaleRule
from deepseek_mp.precision.recipe import OperandRecipe

NVFP4 = RECIPES["nvfp4"].fprop.left
INF, NAN = float("inf"), float("nan")
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
IN_ROWS = ("row", "1x16", "1x32", "1x128")


def operand(granularity: str, format: str = "fp8_e4m3", *, power_of_two: bool = False) -> OperandRecipe:
    found = GRANULARITIES[granularity]
    return OperandRecipe(format=FORMATS[format], granularity=found, rule=ScaleRule.CURRENT, power_of_two=power_of_two)


def by_reference(x: Tensor, side: OperandRecipe) -> Tensor:
    """Quantised by the reference and taken back."""
    values, scale, _, _ = quantise(x, Cast(side.format.name, side.granularity.name, side.power_of_two, True, False))
    return dequantise(values, scale, side.granularity.name)[: x.shape[0]]


def eta(made: Tensor, x: Tensor) -> float:
    """Relative squared error."""
    return float(((made.double() - x.double()).norm() / x.double().norm()) ** 2)


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, but for which NaN it is."""
    raw = [torch.where(t.isnan(), NAN, t).view(torch.int32) for t in (a, b)]
    return torch.equal(*raw)


def trying(seed: int) -> Tensor:
    """[200, 384]: rows of many magnitudes, zeros, subnormals, and what is not finite."""
    torch.manual_seed(seed)
    x = torch.randn(200, 384) * 10.0 ** (torch.rand(200, 1) * 16 - 8)
    x[3], x[4], x[100:, :128] = 0.0, 2.0**-149 * 3, -0.0
    x[9, 7], x[20, 40], x[150, 200] = INF, -INF, NAN
    return x


@pytest.mark.parametrize("granularity", ALIGNMENT)
@pytest.mark.parametrize("format", FP8)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_fp8_is_quantised_and_taken_back_to_the_bit(granularity: str, format: str, power_of_two: bool) -> None:
    side = operand(granularity, format, power_of_two=power_of_two)
    for seed in range(3):
        x = trying(seed)
        assert same(rounded(x, side), by_reference(x, side))
        assert same(rounded(x.bfloat16().float(), side), by_reference(x.bfloat16(), side))


@pytest.mark.parametrize("granularity", ALIGNMENT)
def test_delayed_scales_are_those_of_the_tensor(granularity: str) -> None:
    side = operand(granularity)
    x = torch.randn(64, 256)
    assert torch.equal(rounded(x, replace(side, rule=ScaleRule.DELAYED)), rounded(x, side))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (130, 129), (17, 300)])
def test_groups_at_the_edges_may_be_short(granularity: str, shape: tuple[int, int]) -> None:
    """They are rounded as the same values with zeros beside them."""
    x = torch.randn(shape)
    padded = torch.zeros(256, 384)
    padded[: shape[0], : shape[1]] = x
    for side in (operand(granularity), replace(NVFP4, granularity=GRANULARITIES[granularity])):
        assert torch.equal(rounded(x, side), rounded(padded, side)[: shape[0], : shape[1]])


def test_a_granularity_may_be_any_block() -> None:
    own = OperandRecipe(
        format=FORMATS["int8"], granularity=Granularity(name="mine", rows=2, columns=3), rule=ScaleRule.CURRENT
    )
    x = torch.randn(5, 7)
    made = rounded(x, own)
    block = x[2:4, 3:6]
    scale = block.abs().max() / 127
    assert torch.allclose(made[2:4, 3:6], (block / scale).round() * scale, atol=1e-6)


# -- NVFP4 ---------------------------------------------------------------------------------------------


def nvfp4_by_definition(x: Tensor) -> Tensor:
    """Values of E2M1 times scales of E4M3 times one number, group by group, in float64."""
    whole = x.abs().max().double() / (6 * 448)
    made = torch.zeros_like(x, dtype=torch.float64)
    held = torch.tensor(E2M1, dtype=torch.float64)
    for i in range(x.shape[0]):
        for j in range(0, x.shape[1], 16):
            group = x[i, j : j + 16].double()
            ratio = (group.abs().max() / 6 / whole).float()
            scale = ratio.to(torch.float8_e4m3fn).double() * whole
            if scale:
                near = (group.abs()[:, None] / scale - held).abs().argmin(1)
                made[i, j : j + 16] = held[near].copysign(group) * scale
    return made


def test_nvfp4_is_what_its_definition_says() -> None:
    x = torch.randn(24, 70) * torch.rand(24, 1) * 50
    made = rounded(x, NVFP4)
    torch.testing.assert_close(made.double(), nvfp4_by_definition(x), rtol=1e-6, atol=0)


def test_nvfp4_is_values_that_bf16_holds_times_one_number() -> None:
    x = torch.randn(64, 128)
    values, factor = factored(x, NVFP4)
    assert factor is not None
    assert factor == x.abs().max() / torch.tensor(6 * 448.0)
    assert torch.equal(values.bfloat16().float(), values)
    assert torch.equal(values * factor, rounded(x, NVFP4))
    scale = values.view(64, 8, 16).abs().amax(2) / 6  # E2M1's largest: no group's scale is far above
    assert torch.equal(scale.to(torch.float8_e4m3fn).float(), scale)


def test_groups_too_small_for_their_scale_format_are_zeros() -> None:
    x = torch.ones(1, 48)
    x[0, 16:31] = 2.0**-20 / 448  # its scale is 2**-20 and E4M3 ends at 2**-9
    x[0, 31] = 0
    x[0, 32:] = 2.0**-9 / 448
    made = rounded(x, NVFP4)
    assert torch.equal(made[0, 16:32], torch.zeros(16))
    assert torch.allclose(made[0, 32:], x[0, 32:])
    assert torch.allclose(made[0, :16], x[0, :16])


@pytest.mark.parametrize(("side", "expected"), [(NVFP4, 0.0090), (operand("1x16"), 5e-4), (operand("tensor"), 7e-4)])
def test_the_error_of_normal_numbers_is_the_known_one(side: OperandRecipe, expected: float) -> None:
    x = torch.randn(512, 512)
    assert 0.92 * expected < eta(rounded(x, side), x) < 1.08 * expected


# -- all recipes ---------------------------------------------------------------------------------------

SCALED = [
    pytest.param(side, id=f"{side.format} {name} {'' if side.scale_format is None else side.scale_format}")
    for name in GRANULARITIES
    for side in (
        operand(name),
        operand(name, "int8"),
        replace(NVFP4, granularity=GRANULARITIES[name]),
        operand(name, "fp4_e2m1", power_of_two=True),
    )
]


@pytest.mark.parametrize("side", SCALED)
def test_zeros_stay_and_what_is_rounded_stays(side: OperandRecipe) -> None:
    assert not rounded(torch.zeros(40, 50), side).any()
    x = torch.randn(40, 130)
    x[:, :40] = 0
    once = rounded(x, side)
    assert not once[:, :40].any()
    assert once.isfinite().all()
    if side.scale_format is None:  # a scale that is rounded down cuts the largest, so its group has another scale then
        assert torch.allclose(rounded(once, side), once, rtol=1e-6)
    assert rounded(torch.empty(0, 16), side).shape == (0, 16)
    assert rounded(torch.empty(3, 0), side).shape == (3, 0)


@pytest.mark.parametrize("side", SCALED)
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_what_is_not_finite_is_nan_and_harms_no_other_group(side: OperandRecipe, bad: float) -> None:
    x = torch.randn(140, 150)
    x[0, 0] = 10.0  # the largest, in another group
    x[5, 137] = 0.0
    clean = rounded(x, side)
    x[5, 137] = bad
    made = rounded(x, side)
    name = side.granularity.name
    group = {"row": slice(0, 150), "1x16": slice(128, 144), "1x32": slice(128, 150), "1x128": slice(128, 150)}
    own = group.get(name, slice(137, 138))
    assert made[5, own].isnan().all()
    made[5, own] = clean[5, own]
    assert torch.equal(made, clean)


@pytest.mark.parametrize("side", SCALED)
def test_tiny_and_huge_numbers_have_finite_results(side: OperandRecipe) -> None:
    for size in (2.0**-149, 1e-42, 2.0**-126, 1e-30, 1e30, 1e38):
        x = torch.randn(8, 64).clamp(-1, 1) * size
        x[2] *= 2.0**-12
        x[:, ::5] = 0
        made = rounded(x, side)
        assert made.isfinite().all()
        assert not made[:, ::5].any()
    x = torch.randn(32, 64)
    for power in (2.0**-90, 2.0**90):
        assert torch.equal(rounded(x * power, side), rounded(x, side) * power)


@pytest.mark.parametrize("side", SCALED)
def test_stochastic_rounding_has_the_mean_that_it_rounds(side: OperandRecipe) -> None:
    x = torch.randn(24, 48)
    by_chance = replace(side, rounding=Rounding.STOCHASTIC)
    many = torch.stack([rounded(x, by_chance) for _ in range(256)]).double()
    # The largest of a group are cut where a scale with a format of its own was rounded down.
    inside = x.abs() <= many.abs().amax(0) if side.scale_format else torch.ones_like(x, dtype=torch.bool)
    assert inside.float().mean() > 0.9
    error = eta(many[0][inside], x[inside])
    assert 0.8 * error < 256 * eta(many.mean(0)[inside], x[inside]) < 1.25 * error  # 256 independent errors
    assert error > 1.3 * eta(rounded(x, side)[inside], x[inside])


def test_a_generator_repeats_what_it_drew() -> None:
    x, by_chance = torch.randn(16, 64), replace(NVFP4, rounding=Rounding.STOCHASTIC)
    made = [rounded(x, by_chance, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_type_of_the_tensor_stays(dtype: torch.dtype) -> None:
    x = torch.randn(20, 40, dtype=dtype)
    for side in (
        NVFP4,
        operand("tensor"),
        OperandRecipe(format=FORMATS["fp16"]),
        OperandRecipe(format=FORMATS["fp32"]),
    ):
        made = rounded(x, side)
        assert made.dtype is dtype
        assert torch.equal(made, rounded(x.float(), side).to(dtype)) or side.format.name == "fp32"


def test_plain_formats_round_as_casts_do() -> None:
    x = torch.tensor([[1.0001, 70000.0, -70000.0, 1 + 2.0**-11, 1 + 3 * 2.0**-11, INF, NAN]])

    def plain(name: str) -> Tensor:
        return rounded(x, OperandRecipe(format=FORMATS[name]))

    assert same(plain("fp16"), x.half().float())
    assert plain("fp16")[0, 1:3].tolist() == [INF, -INF]
    assert same(plain("bf16"), x.bfloat16().float())
    assert plain("tf32")[0, 3:5].tolist() == [1.0, 1 + 2.0**-9]
    for name in ("fp32", "fp64"):
        assert plain(name).data_ptr() == x.data_ptr()
    assert rounded(x[0], OperandRecipe(format=FORMATS["bf16"])).shape == (7,)


def test_tensors_of_more_dimensions_have_one_scale() -> None:
    x = torch.randn(3, 4, 5, 6).to(memory_format=torch.channels_last)
    for side in (operand("tensor"), replace(NVFP4, granularity=GRANULARITIES["tensor"])):
        assert torch.equal(rounded(x, side), rounded(x.reshape(12, 30), side).view(x.shape))
    with pytest.raises(ShapeError, match=r"shape \[3, 4, 5, 6\] to round with 1x16 scales.*Flatten it to the operand"):
        rounded(x, NVFP4)


def test_formats_without_a_use_for_scales_are_refused() -> None:
    for name in ("fp64", "e8m0"):
        with pytest.raises(FormatError, match=rf"an operand of {name} with scales\. Allowed: fp32, .*int8"):
            rounded(torch.ones(2, 2), operand("tensor", name))


def test_operands_that_bf16_holds() -> None:
    fits = {
        "bf16": OperandRecipe(format=FORMATS["bf16"]),
        "fp8 tensor": operand("tensor"),
        "fp8 pow2 blocks": operand("1x128", power_of_two=True),
        "nvfp4": NVFP4,
        "unscaled fp8": OperandRecipe(format=FORMATS["fp8_e5m2"]),
        "int8 tensor": operand("tensor", "int8"),
    }
    other = {
        "fp16": OperandRecipe(format=FORMATS["fp16"]),
        "fp8 blocks": operand("1x128"),
        "tf32": OperandRecipe(format=FORMATS["tf32"]),
        "int8 with e4m3 scales": replace(NVFP4, format=FORMATS["int8"]),
    }
    x = torch.randn(64, 256) * torch.rand(64, 1)
    for sides, expected in ((fits, True), (other, False)):
        for name, side in sides.items():
            values, _ = factored(x, side)
            assert fits_bf16(side) == expected, name
            assert torch.equal(values.bfloat16().float(), values) == expected, name
