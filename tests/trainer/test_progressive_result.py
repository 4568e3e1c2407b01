"""A result says in a table what happened, and where the model comes from."""

from __future__ import annotations

import json
import math

import pytest
from torch import nn

from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.records.lines import to_plain
from deepseek_mp.trainer.curves import Point, Verdict
from deepseek_mp.trainer.progressive_result import ProgressiveResult, StageResult

POINTS = tuple(Point(step=s, loss=1.0, grad_norm=1.0, scale=1.0, applied=True) for s in range(1, 11))


def stage(name, verdict, lowered=(), curve=POINTS):
    return StageResult(
        name=name, plan=PrecisionPlan.of("fp32"), lowered=lowered, curve=curve, verdict=verdict,
        seconds_per_step=0.01, seconds=1.0, run_dir=None,
    )  # fmt: skip


@pytest.fixture
def stopped():
    numbers = {"worst_loss": 0.12, "worst_step": 8, "final_loss": 0.1, "gradient_ratio": 1.5}
    bad = Verdict(good=False, reason="the loss is 12 % above", **numbers)
    fine = Verdict(good=True, reason="fine", worst_loss=0.01, final_loss=0.0, gradient_ratio=1.0)
    diverged = (*POINTS[:3], Point(step=4, loss=math.nan, grad_norm=None, scale=1.0, applied=False))
    return ProgressiveResult(
        stages=(
            stage("fp32", Verdict(good=True, reason="the baseline")),
            stage("half", fine, ("a",)),
            stage("all", bad, ("a", "b"), diverged),
        ),
        model=nn.Linear(2, 2),
        reason="stage 'all' is not good",
        complete=False,
        tolerance=0.05,
        layers=2,
    )


def test_the_table_has_a_row_a_stage(stopped):
    lines = [" ".join(line.split()) for line in str(stopped).splitlines()]
    assert "fp32 0 of 2 10 1 10 ms good" in lines
    assert "half 1 of 2 10 1 +1 % 0 % 1x 10 ms good" in lines
    assert "all 2 of 2 4 1 +12 % +10 % 1.5x 10 ms not good the loss is 12 % above" in lines
    assert str(stopped).endswith("stage 'all' is not good; the model is that of stage 'half'")
    assert max(map(len, str(stopped).splitlines())) <= 110


def test_the_last_good_stage_gives_plan_and_model(stopped):
    assert stopped.last_good is stopped.stages[1]
    assert stopped.plan is stopped.stages[1].plan


def test_no_good_stage_is_no_model(stopped):
    failed = stage("fp32", Verdict(good=False, reason="the loss is not finite"), curve=())
    result = ProgressiveResult(stages=(failed,), model=None, reason="no", complete=False, tolerance=0.05, layers=2)
    assert (result.last_good, result.plan) == (None, None)
    assert str(result).endswith("no; no model")
    assert math.isnan(failed.last_loss)


def test_json_has_everything_but_the_model(stopped):
    plain = json.loads(json.dumps(to_plain(stopped.to_json(), "result"), allow_nan=False))
    assert (plain["last_good"], plain["complete"], plain["layers"]) == ("half", False, 2)
    assert plain["stages"][2]["verdict"]["worst_step"] == 8
    bad_step = {"step": 4, "loss": "NaN", "grad_norm": None, "scale": 1.0, "applied": False}
    assert plain["stages"][2]["curve"][3] == bad_step
    assert "model" not in plain
