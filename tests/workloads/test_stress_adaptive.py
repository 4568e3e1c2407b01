"""Live precision under stress: what breaks a static policy costs it little, it does lower layers, and what answered is
in the records of the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from deepseek_mp import AdaptivePrecision
from deepseek_mp.precision import Reason
from deepseek_mp.records import read_run
from deepseek_mp.trainer import MixedPrecisionTrainer
from deepseek_mp.workloads.stress_hooks import OutlierChannels
from deepseek_mp.workloads.stress_policies import adaptive_settings, in_mode
from deepseek_mp.workloads.stress_runs import Outcome, run
from deepseek_mp.workloads.stress_scenarios import SCENARIOS, SMALL, Scenario

MARGIN = 0.0025
"""Relative loss over FP32's, of the final weights."""
NOT_MET = {"rate_spike": 0.01}
"""Where the margin is missed at some seeds, and what holds instead (docs/stress.md says why)."""
AT_OTHER_SEEDS = 1.5
"""Times the margin: `gradient_rows` is just at it."""
OUTLIERS_FROM, RATE_FROM, RATE_TO = 40, 40, 80
"""The step from which on inputs have outliers, and those between which the learning rate is high."""
FP8 = ("tensor", "block")

Line = dict[str, Any]


@dataclass(frozen=True)
class Stressed:
    """A run under stress, and what its records say live precision decided."""

    scenario: Scenario
    outcome: Outcome
    lines: list[Line]

    @property
    def guarded(self) -> list[Line]:
        return [line for line in self.lines if line["reason"] == Reason.GUARDED]

    def lowered(self, layer: str) -> list[Line]:
        """The decisions that put the layer into FP8."""
        return [line for line in self.lines if line["layer"] == layer and line["new"] in FP8]


def stressed(name: str, seed: int, path: Path) -> Stressed:
    """The scenario under live precision, as it is read back from a run directory."""
    scenario, made = SCENARIOS[name](), list[MixedPrecisionTrainer]()

    def build(given: Scenario, model: nn.Module, device: torch.device) -> Any:
        live = AdaptivePrecision(adaptive_settings(given.steps))
        made.append(in_mode("bf16", callbacks=[live], run_dir=path)(given, model, device))  # type: ignore[arg-type]
        return made[0]

    outcome = run(scenario, build, seed)
    made[0].close()
    return Stressed(scenario, outcome, [line for line in read_run(path).decisions if "step" in line["evidence"]])


def guarded_for_outliers(found: Stressed) -> None:
    """The layer with the outliers is raised by the first probe that sees them, for them."""
    (line,) = [line for line in found.guarded if line["layer"] == "blocks.0.up"]
    assert line["evidence"]["guard"] == "kurtosis"
    assert OUTLIERS_FROM <= line["evidence"]["step"] <= OUTLIERS_FROM + 3
    assert line["evidence"]["kurtosis"] > 20 * line["evidence"]["when_lowered"]
    assert found.lowered("blocks.0.up")


def raised_for_its_cost(found: Stressed) -> None:
    """The layer behind the gate goes back when one channel grows so far that the layer costs the loss budget ten times
    over, or its rows are lost, and is never in FP8 again but until the next probe that sees it.
    """
    raised = [line for line in found.lines if line["layer"] == "blocks.1.down" and line["new"] == "bf16"]
    first, *_ = found.lowered("blocks.1.down")
    assert first["evidence"]["loss"] < 1e-4
    assert raised[-1]["evidence"]["step"] > found.lowered("blocks.1.down")[-1]["evidence"]["step"]
    for line in raised:
        assert line["old"] in FP8
        assert line["evidence"].get("guard") in (None, "limits", "kurtosis")
        assert "guard" in line["evidence"] or "of the loss budget is left" in line["detail"]


def refused_for_gradients(found: Stressed) -> None:
    """`block` is refused for what it does to the stressed layer's gradients, and `tensor` has the range; where another
    layer's gradients come to be as uneven, it is raised for that.
    """
    assert {line["new"] for line in found.lowered("enter")} == {"tensor"}
    first = found.lowered("enter")[0]["evidence"]
    assert "row-balanced error of grad_output" in first["refused"]["block"]
    for line in found.guarded:
        assert line["evidence"]["guard"] == "limits"
        assert "grad_output" in line["detail"]


def guarded_while_the_rate_is_high(found: Stressed) -> None:
    """All lowered layers go back to BF16 with the first step at the high rate, and none is lowered meanwhile."""
    first = [line for line in found.guarded if line["evidence"]["step"] <= RATE_FROM + 2]
    assert {line["layer"] for line in first} >= set(found.scenario.layers)
    assert {line["evidence"]["guard"] for line in first} == {"learning_rate"}
    assert first[0]["evidence"]["rate"] > 4 * first[0]["evidence"]["highest"]
    for line in found.guarded:
        assert RATE_FROM <= line["evidence"]["step"] <= RATE_TO + 3
    runs_in_fp8(found)


def not_needed(found: Stressed) -> None:
    """Scales follow what FP16 cannot hold, and weights are FP32."""
    assert not found.guarded
    runs_in_fp8(found)


def runs_in_fp8(found: Stressed) -> None:
    """The stressed layers were lowered, at less than the whole budget."""
    for layer in found.scenario.layers:
        (first, *_) = found.lowered(layer)
        assert first["evidence"]["loss"] < 1e-3


ANSWERS: dict[str, Callable[[Stressed], None]] = {
    "outlier_channel": guarded_for_outliers,
    "tiny_gradients": not_needed,
    "rate_spike": guarded_while_the_rate_is_high,
    "aligned_gate": raised_for_its_cost,
    "drifting_gain": not_needed,
    "gradient_rows": refused_for_gradients,
    "stagnation": not_needed,
}


@pytest.mark.parametrize(
    ("name", "seed"),
    [
        *((name, 0) for name in SCENARIOS),
        *(pytest.param(name, seed, marks=pytest.mark.stress) for seed in (1, 2) for name in SCENARIOS),
    ],
)
def test_it_survives_what_breaks_a_static_policy_and_its_records_say_how(name: str, seed: int, tmp_path: Path) -> None:
    found = stressed(name, seed, tmp_path)
    assert found.outcome.finite
    assert found.outcome.gap <= NOT_MET.get(name, MARGIN if seed == 0 else AT_OTHER_SEEDS * MARGIN)
    assert name in NOT_MET or not found.outcome.broken
    assert found.outcome.lowered > 0
    ANSWERS[name](found)


def test_outliers_that_come_between_two_probes_cost_one_step() -> None:
    """Probes are at even steps."""
    late = partial(OutlierChannels, layer="blocks.0.up", every=128, factor=1000.0, start=SMALL.steps // 4 + 1)
    outcome = run(replace(SCENARIOS["outlier_channel"](), stress=late), "adaptive")
    assert outcome.gap <= MARGIN
    assert outcome.skipped == 1
    assert [d.new for step, d in outcome.decisions if d.layer == "blocks.0.up" and step > SMALL.steps // 4] == ["fp32"]
