"""Each scenario breaks the policy that it is meant to break, and leaves FP32 alone."""

from __future__ import annotations

import pytest

from deepseek_mp.workloads.stress_runs import run
from deepseek_mp.workloads.stress_scenarios import SCENARIOS


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_breaks_its_policy_and_not_fp32(name: str) -> None:
    scenario = SCENARIOS[name]()
    broken = run(scenario, scenario.breaks)
    again = run(scenario, "fp32_nudged")
    assert broken.broken
    assert again.finite
    assert again.skipped == 0
    assert abs(again.gap) < 0.003
