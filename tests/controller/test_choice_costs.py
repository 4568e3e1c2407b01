"""Which recipes are a choice for a layer."""

import math
from dataclasses import replace

from deepseek_mp.controller.adaptive_units import AdaptiveUnit
from deepseek_mp.controller.choice_costs import CostRules
from deepseek_mp.controller.settings import AdaptiveSettings
from deepseek_mp.controller.trend import Slope
from deepseek_mp.precision import RECIPES, Operand, Role
from deepseek_mp.sensitivity import Effect, UnitReading
from deepseek_mp.sensitivity.measure import OPERAND_FIELDS, PRODUCT_OPERANDS
from deepseek_mp.sensitivity.prediction import Predictor

UNIT = AdaptiveUnit(macs=1e9, seconds={"bf16": 1e-3, "row": 0.6e-3, "fp32": 4e-3}, recipes=("fp32", "row"), inputs=10)


def judged(bf16=1e-8, row=1e-5, recipe="bf16", settings=None, slope=None, unit=UNIT, **errors):
    def effect(second, **changed):
        found = {which: dict.fromkeys(OPERAND_FIELDS, 0.0) | changed for which in PRODUCT_OPERANDS}
        return Effect(first=0.0, standard_error=1e-5, second=second, errors=found)

    reading = UnitReading(
        order=0,
        batches=1,
        calls=1,
        effects={"bf16": effect(bf16), "row": effect(row, **errors)},
        energy=1.0,
        row_energy=1.0,
        spreads={operand: {"kurtosis": 3.0, "amax": 1.0} for operand in Operand},
    )
    predictor = Predictor({"a": reading}, 2.0)
    rules = CostRules(
        base=RECIPES["bf16"],
        settings=settings or AdaptiveSettings(),
        predictor=predictor,
        loss=2.0,
        seconds=1e-3,
        slope=slope,
        remaining=100,
    )
    return rules.judge("a", unit, reading, recipe)


def never(found, recipe):
    return all(math.isinf(found.costs.predicted[recipe][role].loss) for role in Role)


def test_a_healthy_layer_may_go_down_and_not_up():
    found = judged()
    assert never(found, "fp32")
    assert not never(found, "row")
    assert (found.above, found.unpaid) == ("", "")
    assert found.least.loss == 0.5e-8
    assert found.harm < 1e-4


def test_a_layer_that_the_region_harms_has_one_choice():
    found = judged(bf16=2e-4)
    assert found.above == "fp32"
    assert never(found, "bf16")
    assert never(found, "row")
    assert found.least.loss == 0


def test_it_stays_above_until_the_share_is_half():
    assert judged(bf16=8e-5).above == ""
    assert judged(bf16=8e-5, recipe="fp32").above == "fp32"
    assert judged(bf16=4e-5, recipe="fp32").above == ""


def test_a_limit_that_is_broken_rules_a_recipe_out():
    assert never(judged(mass=-0.5), "row")


def test_what_does_not_pay_says_so_to_the_layer_that_is_in_it():
    flat = Slope(fall=1e-9, error=0.0)
    assert "would save" in judged(recipe="row", slope=flat).unpaid
    assert judged(slope=flat).unpaid == ""
    assert never(judged(slope=flat), "row")


def test_with_memory_as_the_objective_the_budgets_alone_decide():
    flat, memory = Slope(fall=1e-9, error=0.0), AdaptiveSettings(objective="memory")
    assert not never(judged(slope=flat, settings=memory), "row")


def test_where_nothing_is_above_the_base_is_a_choice_even_if_it_overflows():
    found = judged(bf16=math.inf, unit=replace(UNIT, recipes=("row",)))
    assert found.above == ""
    assert found.costs.predicted["bf16"] == {}
