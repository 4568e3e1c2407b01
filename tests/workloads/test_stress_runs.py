"""A run says what a policy lost and why, and each scenario breaks what it is meant to break while FP32 trains well."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from deepseek_mp.trainer import MixedPrecisionTrainer
from deepseek_mp.workloads.stress_policies import POLICIES, in_mode
from deepseek_mp.workloads.stress_runs import Outcome, run
from deepseek_mp.workloads.stress_scenarios import SCENARIOS, Scenario, Size

TINY = Size(width=128, hidden=128, layers=2, batch_size=16, examples=64, steps=8, gain=1.0)
GOOD = Outcome(
    scenario="s",
    policy="p",
    seed=0,
    reference=2.0,
    loss=2.0,
    own_loss=2.0,
    gave_up=False,
    skipped=0,
    steps=8,
    lowered=0.0,
    decisions=(),
)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_breaks_its_policy_while_fp32_trains_well(name: str) -> None:
    scenario = SCENARIOS[name]()
    fp32, broken = run(scenario, "fp32"), run(scenario, scenario.breaks)
    untrained = scenario.loss_fn(torch.zeros(1, 16), torch.cat([torch.ones(1, 16), torch.ones(1, 1)], 1))
    assert fp32.finite
    assert (fp32.gap, fp32.skipped, fp32.steps) == (pytest.approx(0, abs=1e-4), 0, scenario.steps)
    assert fp32.loss < 0.6 * float(untrained) * float(scenario.data(0).validation.batch(0, 0)[1][0, -1])
    assert broken.broken


@pytest.mark.parametrize(
    ("changed", "broken"),
    [
        ({}, False),
        ({"loss": 2.019, "own_loss": 1.5}, False),
        ({"loss": 2.021}, True),
        ({"own_loss": 2.021}, True),
        ({"loss": math.nan}, True),
        ({"own_loss": math.inf}, True),
        ({"gave_up": True}, True),
        ({"skipped": 3}, False),
    ],
)
def test_a_policy_breaks_by_a_gap_or_by_numbers_that_are_none(changed: dict[str, Any], broken: bool) -> None:
    assert replace(GOOD, **changed).broken is broken


def test_gaps_are_relative_to_fp32() -> None:
    outcome = replace(GOOD, loss=2.2, own_loss=1.0)
    assert outcome.gap == pytest.approx(0.1)
    assert outcome.own_gap == pytest.approx(-0.5)
    assert outcome.to_json()["broken"] is True
    assert replace(GOOD, own_loss=math.inf).to_json()["own_gap"] == "Infinity"


def test_a_run_is_the_same_every_time() -> None:
    first, again = (run(SCENARIOS["aligned_gate"](TINY), "fp8_tensor") for _ in range(2))
    assert first == again
    assert first != run(SCENARIOS["aligned_gate"](TINY), "fp8_tensor", seed=1)


def test_changes_of_the_plan_are_told_with_their_step() -> None:
    def adaptive(scenario: Scenario, model: nn.Module, device: torch.device) -> MixedPrecisionTrainer:
        trainer = in_mode("tensor")(scenario, model, device)
        step, count = trainer.step, iter(range(scenario.steps))

        def changing(batch: Any) -> Any:
            if next(count) == 3:
                trainer.change_plan("tensor", pin={"blocks.0.up": "bf16"})
            return step(batch)

        trainer.step = changing
        return trainer

    outcome = run(SCENARIOS["outlier_channel"](TINY), adaptive, name="adaptive")
    assert outcome.policy == "adaptive"
    at_first = {decision.layer for step, decision in outcome.decisions if step == 0}
    later = [(step, d.layer, d.new) for step, d in outcome.decisions if step]
    assert {"enter", "blocks.0.up", "head"} <= at_first
    assert later == [(3, "blocks.0.up", "bf16")]
    # Of six layers the head stays in BF16, as the last one does; another one joins it after three of eight steps.
    assert outcome.lowered == pytest.approx((3 * 5 + 5 * 4) / (8 * 6))
    assert run(SCENARIOS["outlier_channel"](TINY), "pure_bf16").lowered == 0


def test_a_run_that_is_given_up_ends_there_and_counts_its_steps() -> None:
    policy = in_mode("fp32", max_skipped_steps=2)

    class Bad(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (math.nan if self.training else 1.0)

    def model(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return Bad(128, 16)

    scenario = replace(SCENARIOS["stagnation"](TINY), model=model)
    outcome = run(scenario, policy)
    assert (outcome.gave_up, outcome.steps, outcome.skipped, outcome.finite) == (True, 2, 2, False)
    assert math.isfinite(outcome.loss)


@pytest.mark.stress
@pytest.mark.parametrize("name", SCENARIOS)
def test_all_policies_at_three_seeds(name: str) -> None:
    scenario = SCENARIOS[name]()
    found = {policy: [run(scenario, policy, seed) for seed in range(3)] for policy in POLICIES}
    assert all(outcome.broken for outcome in found[scenario.breaks])
    assert all(outcome.broken for outcome in found["pure_bf16"])
    assert not any(outcome.broken for name in ("fp32", "fp32_nudged", "bf16_amp") for outcome in found[name])
    assert max(abs(outcome.gap) for outcome in found["fp32_nudged"]) < 0.003


REMEDIES = {
    "outlier_channel": ("tensor", "bf16"),
    "tiny_gradients": ("fp16", "bf16"),
    "rate_spike": ("fp16", "bf16"),
    "aligned_gate": ("tensor", "bf16"),
    "drifting_gain": ("fp16", "bf16"),
    "gradient_rows": ("block", "bf16"),
}
"""What the broken policy trains in, and what the scenario's layers need instead."""


@pytest.mark.stress
@pytest.mark.parametrize("name", REMEDIES)
def test_higher_precision_of_its_layers_is_enough_to_survive(name: str) -> None:
    scenario = SCENARIOS[name]()
    low, high = REMEDIES[name]
    outcome = run(scenario, in_mode(low, pin=dict.fromkeys(scenario.layers, high)))
    assert not outcome.broken


@pytest.mark.stress
def test_a_loss_scale_that_measures_saves_tiny_gradients() -> None:
    assert not run(SCENARIOS["tiny_gradients"](), in_mode("fp16", loss_scale_policy="predictive")).broken


@pytest.mark.stress
@pytest.mark.parametrize("name", SCENARIOS)
def test_without_its_stress_the_policy_survives(name: str) -> None:
    scenario = SCENARIOS[name](calm=True)
    assert not run(scenario, scenario.breaks).broken
