"""From predictions to a plan, with made-up numbers."""

import math
from dataclasses import replace

import pytest

from deepseek_mp.errors import PlanError
from deepseek_mp.precision import RECIPES, Reason, Role
from deepseek_mp.precision.allocation import Budget
from deepseek_mp.precision.composite import with_roles
from deepseek_mp.precision.planning import Predicted, UnitCosts, choice_for, choices_of, plan_for, speed_of

BF16, ROW, FP32 = RECIPES["bf16"], RECIPES["row"], RECIPES["fp32"]
TIMES = {"fp32": 4e-3, "bf16": 1e-3, "row": 0.6e-3}


def unit(name="layer", row_loss=1e-3, seconds=None, wgrad_noise=1e-2):
    predicted = {
        "bf16": {role: Predicted(loss=0.0, noise=1e-6) for role in Role},
        "row": {
            Role.FPROP: Predicted(loss=row_loss, noise=2e-3),
            Role.DGRAD: Predicted(loss=0.0, noise=1e-3),
            Role.WGRAD: Predicted(loss=0.0, noise=wgrad_noise),
        },
    }
    return UnitCosts(name=name, macs=1e9, predicted=predicted, seconds=TIMES if seconds is None else seconds)


def test_a_choice_adds_up_its_products():
    choice = choice_for(unit(), with_roles(ROW, [Role.DGRAD, Role.WGRAD], BF16))
    assert choice.seconds == pytest.approx((1e-3 + 2 * 0.6e-3) / 3)
    assert choice.loss == 0
    assert choice.noise == pytest.approx(1e-6 + 1e-3 + 1e-2)


def test_what_is_not_timed_is_guessed_from_fp32():
    timed = {"fp32": 4e-3, "bf16": 1e-3}
    assert choice_for(unit(seconds=timed), ROW).seconds == pytest.approx(4e-3 / speed_of(ROW))


def test_a_recipe_that_does_not_pay_is_no_choice():
    slow = {**TIMES, "row": 0.98e-3}
    assert "row" not in choices_of(unit(seconds=slow), [ROW], BF16, by_role=False)
    assert "row" in choices_of(unit(), [ROW], BF16, by_role=False)


def test_an_overflow_is_never_chosen():
    assert choice_for(unit(row_loss=math.inf), ROW).loss == math.inf


def test_the_budget_is_spent_where_it_saves_most():
    units = [unit("cheap", row_loss=1e-4), unit("dear", row_loss=2e-3)]
    plan, found = plan_for(units, [ROW], BF16, Budget(loss=1e-3, noise=1.0), by_role=False)
    assert [(rule.pattern, rule.recipe.name) for rule in plan.rules] == [("cheap", "row")]
    assert found.totals.loss == pytest.approx(1e-4)
    decisions = {decision.layer: decision for decision in plan.decisions}
    assert decisions["dear"].new == "bf16"
    assert "row would save" in decisions["dear"].detail
    assert decisions["cheap"].reason is Reason.ALLOCATED
    assert decisions["cheap"].evidence["seconds_are"] == "measured"


def test_noise_has_a_budget_of_its_own():
    plan, _ = plan_for([unit(row_loss=0.0)], [ROW], BF16, Budget(loss=1.0, noise=5e-3), by_role=True)
    (rule,) = plan.rules
    assert rule.recipe.name == "row[fprop+dgrad]"


def test_a_budget_that_not_even_fp32_meets():
    dear = {name: {role: Predicted(loss=1.0, noise=0.0) for role in Role} for name in ("fp32", "bf16")}
    costs = [UnitCosts(name="a", macs=1.0, predicted=dear, seconds={})]
    with pytest.raises(PlanError, match="no allocation: the loss budget"):
        plan_for(costs, [], BF16, Budget(loss=1e-3, noise=1e-3), by_role=False)


def test_no_units_give_a_plan_of_the_base():
    plan, found = plan_for([], [ROW], BF16, Budget(loss=1.0, noise=1.0), by_role=False)
    assert plan.base == BF16
    assert found is None


def test_with_bytes_as_the_objective_a_recipe_need_not_be_faster():
    slow = replace(unit(row_loss=1e-4, seconds={**TIMES, "row": 2e-3}), inputs=1000)
    budget = Budget(loss=1e-3, noise=1.0)
    plan, found = plan_for([slow], [ROW], BF16, budget, by_role=False, objective="bytes")
    assert [rule.recipe.name for rule in plan.rules] == ["row"]
    assert found.totals.bytes == 1000
    (decision,) = plan.decisions
    assert decision.evidence["saved_bytes"] == 1000
    assert decision.evidence["saved_seconds"] == pytest.approx(-1e-3)
    assert not plan_for([slow], [ROW], BF16, budget, by_role=False)[0].rules


def test_bytes_are_saved_by_wgrads_input_alone():
    known = replace(unit(row_loss=1.0, wgrad_noise=1e-3), inputs=1000)
    plan, _ = plan_for([known], [ROW], BF16, Budget(loss=1e-3, noise=1.0), by_role=True, objective="bytes")
    assert "wgrad" in plan.rules[0].recipe.name
