"""When the region's own format is too coarse for a layer, and where the layer goes then."""

import math

import pytest

from deepseek_mp.controller.region import EXACT, harbour, rounding, shares
from deepseek_mp.controller.settings import AdaptiveSettings
from deepseek_mp.precision import RECIPES, Operand, Role
from deepseek_mp.precision.planning import UnitCosts
from deepseek_mp.sensitivity import Effect, UnitReading
from deepseek_mp.sensitivity.measure import OPERAND_FIELDS, PRODUCT_OPERANDS
from deepseek_mp.sensitivity.prediction import KAPPA, Predictor

SETTINGS = AdaptiveSettings(loss_budget=1e-3, noise_budget=0.05)
BF16 = RECIPES["bf16"]


def effect(second, first=0.0, **errors):
    found = {which: dict.fromkeys(OPERAND_FIELDS, 0.0) | errors for which in PRODUCT_OPERANDS}
    return Effect(first=first, standard_error=1e-3, second=second, errors=found)


def found(amax=1.0, loss=2.0, **effects):
    reading = UnitReading(
        order=0,
        batches=1,
        calls=1,
        effects=effects,
        energy=1.0,
        row_energy=1.0,
        spreads={operand: {"amax": amax * (1e-3 if operand is Operand.GRAD_OUTPUT else 1)} for operand in Operand},
    )
    return Predictor({"a": reading}, loss)


def test_only_the_second_order_and_the_noise_count():
    chance = found(bf16=effect(1e-6, first=0.5))
    assert rounding("a", BF16, chance)[Role.FPROP].loss == pytest.approx(5e-7)
    assert shares("a", chance, SETTINGS).of["bf16"] == pytest.approx(5e-4)


def test_the_larger_share_of_the_two_budgets_counts():
    noisy = found(bf16=effect(1e-3))
    assert KAPPA * 1e-3 / 0.05 < 0.5e-3 / 1e-3
    assert shares("a", noisy, SETTINGS).of["bf16"] == pytest.approx(0.5)
    strict = AdaptiveSettings(loss_budget=1.0, noise_budget=0.05)
    assert shares("a", noisy, strict).of["bf16"] == pytest.approx(KAPPA * 1e-3 / 0.05)


def test_an_overflow_is_a_share_without_end():
    assert math.isinf(shares("a", found(bf16=effect(math.inf)), SETTINGS).of["bf16"])


def costs(seconds=None):
    return UnitCosts(name="a", macs=1e9, predicted={}, seconds=seconds or {})


def test_the_fastest_that_is_exact_enough_is_taken():
    seen = shares("a", found(bf16=effect(1e-3), tf32=effect(1e-6)), SETTINGS)
    assert harbour(costs(), ["fp32", "tf32", "row"], BF16, seen) == "tf32"
    assert harbour(costs({"fp32": 1e-3, "tf32": 2e-3}), ["fp32", "tf32"], BF16, seen) == "fp32"


def test_what_is_not_exact_enough_gives_way_to_the_highest():
    seen = shares("a", found(bf16=effect(1e-2), tf32=effect(1e-4)), SETTINGS)
    assert seen.of["tf32"] > EXACT
    assert harbour(costs(), ["tf32", "fp32"], BF16, seen) == "fp32"
    assert harbour(costs(), ["tf32"], BF16, seen) == "tf32"


def test_fp16_is_taken_where_its_range_is_safe():
    measured = {"bf16": effect(1e-3), "fp16": effect(1e-6)}
    safe, large = (shares("a", found(amax=amax, **measured), SETTINGS) for amax in (1.0, 3e4))
    assert harbour(costs(), ["fp16", "fp32"], BF16, safe) == "fp16"
    assert "fp16" in large.unsafe
    assert harbour(costs(), ["fp16", "fp32"], BF16, large) == "fp32"
    assert harbour(costs(), ["fp16"], BF16, large) == ""


def test_without_a_recipe_above_there_is_none():
    assert harbour(costs(), ["row", "bf16"], BF16, shares("a", found(bf16=effect(1.0)), SETTINGS)) == ""
