"""Stages are planned by what was measured, else by the work of the layers on the first batch, before any is trained."""

from __future__ import annotations

import pytest
import torch
from small_runs import sgd
from torch import nn

from deepseek_mp.errors import FormatError, PlanError
from deepseek_mp.precision import Decision, PrecisionPlan, Reason
from deepseek_mp.trainer.curves import Limits
from deepseek_mp.trainer.stage_probe import plan_stages
from deepseek_mp.trainer.stage_training import Setting, StageTraining


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 16), nn.Linear(16, 2))


def training(**options):
    batch = (torch.randn(4, 8), torch.tensor([0, 1, 0, 1]))
    return StageTraining(
        Setting(
            loader=[batch],
            steps=2,
            limits=Limits(),
            optimizer=sgd,
            options={"device": "cpu", "emulate": True, "progress": False, **options},
            run_dir=None,
        ),
        model(),
    )


def shown(planned):
    return {stage.name: stage.lowered for stage in planned.stages}


def test_a_named_format_is_lowered_by_the_work_of_its_layers():
    assert shown(plan_stages(training(), "bf16", (0.5, 1.0))) == {"half": ("4", "2"), "all": ("0", "2", "4", "5")}


def test_pinned_layers_stay_as_they_are_in_every_stage():
    planned = plan_stages(training(pin={"4": "fp32"}), "bf16", (0.5, 1.0))
    assert shown(planned) == {"half": ("2", "0"), "all": ("0", "2", "5")}
    assert all(stage.plan.recipe_for("4").name == "fp32" for stage in planned.stages)


def test_auto_lowers_what_saves_most_as_measured(monkeypatch):
    def measured(model, batch, config, **_):
        saved = {"0": 3.0, "2": 1.5, "4": 1.1, "5": 2.0}
        return PrecisionPlan(
            base="bf16",
            decisions=tuple(
                Decision(
                    layer=name,
                    old="fp32",
                    new="bf16",
                    reason=Reason.MEASURED_FASTEST,
                    evidence={"fp32_ms": ms, "bf16_ms": 1.0},
                )
                for name, ms in saved.items()
            ),
        )

    monkeypatch.setattr("deepseek_mp.trainer.loop.measured_plan", measured)
    planned = plan_stages(training(), "auto", (0.5, 1.0))
    assert shown(planned) == {"half": ("0", "5"), "all": ("0", "2", "4", "5")}
    assert planned.stages[1].plan.decisions[0].evidence == {"fp32_ms": 3.0, "bf16_ms": 1.0}


def test_auto_that_keeps_fp32_leaves_nothing_to_lower(monkeypatch):
    whole = Decision(layer="", old="fp32", new="fp32", reason=Reason.MEASURED_SLOWER, detail="step bf16 9 ms")
    plan = PrecisionPlan(base="fp32", decisions=(whole,))
    monkeypatch.setattr("deepseek_mp.trainer.loop.measured_plan", lambda *args, **options: plan)
    planned = plan_stages(training(), "auto", (0.5, 1.0))
    assert planned.stages == ()
    assert planned.none == "'auto' chose fp32: step bf16 9 ms"
    assert "base fp32" in plan_stages(training(), "fp32", (1.0,)).none


def test_plans_of_one_s_own_in_their_order(monkeypatch):
    monkeypatch.setattr("deepseek_mp.trainer.loop.measured_plan", pytest.fail)
    own = {"two": PrecisionPlan.of("fp32", {"2": "bf16"}), "rest": "bf16"}
    planned = plan_stages(training(pin={"5": "fp32"}), "auto", own)
    assert shown(planned) == {"two": ("2",), "rest": ("0", "2", "4")}


def test_plans_that_do_not_fit_are_refused_before_anything_is_trained():
    with pytest.raises(PlanError, match="matches no layer"):
        plan_stages(training(), "bf16", {"one": "bf16", "two": PrecisionPlan.of("fp32", {"nowhere": "bf16"})})
    with pytest.raises(FormatError, match="does not multiply"):
        plan_stages(training(emulate=False), "block", (1.0,))


def test_the_model_and_the_random_state_are_as_they_were():
    ours = training()
    weights = [p.clone() for p in ours.model.parameters()]
    plan_stages(ours, "bf16", (0.5, 1.0))
    assert all(map(torch.equal, weights, ours.model.parameters()))
    assert type(ours.model[0]) is nn.Linear
