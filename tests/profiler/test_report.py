"""Reports as mappings, as plans and on disk."""

import json
from dataclasses import replace

import pytest

from deepseek_mp import MixedPrecisionTrainer, PrecisionProfiler, ProfileReport
from deepseek_mp.errors import ConfigError, PlanError
from deepseek_mp.precision import RECIPES


def test_a_report_survives_json(report, tmp_path):
    report.save(tmp_path / "report.json")
    again = ProfileReport.load(tmp_path / "report.json")
    assert again.to_json() == report.to_json()
    assert again.plan(1e-3) == report.plan(1e-3)
    data = json.loads((tmp_path / "report.json").read_text())
    with pytest.raises(PlanError, match="a profile of version 99"):
        ProfileReport.from_json({**data, "version": 99})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("units", "report.json is not JSON"),
        ("[1]", "a profile report that is a list without units"),
        ('{"version": 1, "base": "bf16", "rules": []}', "a profile report that is a dict without units"),
    ],
)
def test_another_file_is_refused(tmp_path, text, expected):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(PlanError, match=expected):
        ProfileReport.load(tmp_path / "report.json")


def test_an_unknown_unit_is_named_with_a_suggestion(report):
    with pytest.raises(KeyError, match="no unit 'dwn'"):
        report["dwn"]


@pytest.mark.parametrize("budget", [0, -1e-3, float("nan"), float("inf"), "1e-3", True])
def test_a_budget_is_a_positive_number(report, budget):
    with pytest.raises(ConfigError, match="a number above zero"):
        report.plan(budget)
    with pytest.raises(ConfigError, match="noise_budget="):
        report.plan(noise_budget=budget)


def test_a_smaller_budget_lowers_less(report):
    asked = ["bf16", "tensor", "row"]
    generous, tight = report.plan(1e-2, recipes=asked), report.plan(1e-7, recipes=asked)
    assert {rule.recipe.name for rule in generous.rules} <= {"tensor", "row"}
    lowered = [sum(rule.recipe.name in ("tensor", "row") for rule in plan.rules) for plan in (generous, tight)]
    assert lowered[0] > lowered[1]
    spent = sum(decision.evidence["loss"] for decision in tight.decisions)
    assert spent <= 1e-7


def test_products_may_differ(report):
    plan = report.plan(2e-5, recipes=["row"], by_role=True)
    assert any("[" in rule.recipe.name for rule in plan.rules)


def test_only_what_was_profiled_can_be_chosen(report):
    with pytest.raises(PlanError, match="recipe 'nvfp4', which was not profiled"):
        report.plan(recipes=["nvfp4"])


def test_a_recipe_of_ones_own_is_profiled_chosen_and_kept(model, batches, tmp_path):
    mine = replace(RECIPES["row"], name="mine")
    report = PrecisionProfiler(model, recipes=["bf16", mine]).analyze(batches, max_batches=1, time_layers=False)
    plan = report.plan(recipes=["mine"], by_role=True)
    assert mine in [rule.recipe for rule in plan.rules]
    report.save(tmp_path / "report.json")
    assert ProfileReport.load(tmp_path / "report.json").plan(recipes=["mine"], by_role=True) == plan


def test_no_plan_without_data(model):
    with pytest.raises(PlanError, match="without data"):
        PrecisionProfiler(model).analyze().plan()


def test_the_trainer_takes_the_plan(model, report, batches):
    plan = report.plan(1e-2, recipes=["bf16", "row"])
    trainer = MixedPrecisionTrainer(model, plan, emulate=True)
    result = trainer.fit(batches, epochs=1)
    assert result.steps_applied == len(batches)
    decided = {decision.layer: decision.new for decision in trainer.plan.decisions}
    assert "row" in decided.values()
