"""Settings of live precision: what is refused, and how often it decides."""

import json

import pytest

from deepseek_mp.controller.settings import AdaptiveSettings
from deepseek_mp.errors import ConfigError, PlanError


@pytest.mark.parametrize(
    "values",
    [{"loss_budget": 0}, {"noise_budget": float("nan")}, {"share": 1.5}, {"probe_every": 0}, {"confirmations": 1.5},
     {"warm_up": -1}, {"decide_every": 0}, {"pays": True}, {"most_at_once": 2}],
)  # fmt: skip
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ConfigError, match="Allowed"):
        AdaptiveSettings(**values)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(PlanError, match="recipe"):
        AdaptiveSettings(recipes=("blok",))


def test_an_unknown_objective_is_refused():
    with pytest.raises(ConfigError, match="'time' or 'memory'"):
        AdaptiveSettings(objective="bytes")
    assert AdaptiveSettings(objective="memory").to_json()["objective"] == "memory"


@pytest.mark.parametrize(("steps", "every"), [(None, 256), (100, 32), (6400, 100), (10**6, 256)])
def test_a_run_decides_some_64_times(steps, every):
    assert AdaptiveSettings().interval(steps) == every
    assert AdaptiveSettings(decide_every=7).interval(steps) == 7


def test_they_are_plain_values():
    assert json.loads(json.dumps(AdaptiveSettings(recipes=("row",)).to_json()))["recipes"] == ["row"]
