"""Live precision under stress: what breaks a static policy costs it little, and it does lower layers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from deepseek_mp.workloads.stress_hooks import OutlierChannels
from deepseek_mp.workloads.stress_runs import run
from deepseek_mp.workloads.stress_scenarios import SCENARIOS, SMALL

MARGIN = 0.0025
"""Relative loss over FP32's, of the final weights."""
NOT_MET = {"rate_spike": 0.01}
"""Where the margin is missed at some seeds, and what holds instead (docs/stress.md says why)."""


@pytest.mark.parametrize("name", SCENARIOS)
def test_it_survives_what_breaks_a_static_policy(name: str) -> None:
    outcome = run(SCENARIOS[name](), "adaptive")
    assert outcome.finite
    assert outcome.gap <= NOT_MET.get(name, MARGIN)
    assert name in NOT_MET or not outcome.broken
    assert outcome.lowered > 0


def test_outliers_that_come_between_two_probes_cost_one_step() -> None:
    """Probes are at even steps."""
    late = partial(OutlierChannels, layer="blocks.0.up", every=128, factor=1000.0, start=SMALL.steps // 4 + 1)
    outcome = run(replace(SCENARIOS["outlier_channel"](), stress=late), "adaptive")
    assert outcome.gap <= MARGIN
    assert outcome.skipped == 1
    assert [d.new for step, d in outcome.decisions if d.layer == "blocks.0.up" and step > SMALL.steps // 4] == ["fp32"]
