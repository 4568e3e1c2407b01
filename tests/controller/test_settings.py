"""Settings of live precision: what is refused, and how often it decides."""

import json

import pytest

from deepseek_mp.controller.settings import AdaptiveSettings
from deepseek_mp.errors import ConfigError


@pytest.mark.parametrize(
    "values",
    [{"loss_budget": 0}, {"noise_budget": float("nan")}, {"share": 1.5}, {"probe_every": 0}, {"confirmations": 1.5},
     {"warm_up": -1}, {"decide_every": 0}, {"pays": True}, {"most_at_once": 2}],
)  # fmt: skip
def test_values_out_of_range_are_refused(values):
    with pytest.raises(ConfigError, match="Allowed"):
        AdaptiveSettings(**values)


@pytest.mark.parametrize(
    ("recipes", "says"),
    [
        (("blok",), r"Allowed: fp32, .*Did you mean 'block'"),
        (5, r"recipes=5\. Allowed: a tuple .*Pass recipes=\("),
        ("fp32", r"recipes='fp32'\. Allowed: a tuple .*Pass recipes=\('fp32',\)"),
        ((), r"recipes=\(\)\. Allowed: one name or more, or None"),
        (("row", "fp64"), "Allowed: fp32, tf32, bf16, fp16, .*Change 'fp64'"),
        (("hf32",), "Change 'hf32'"),
        ((8,), "Allowed: fp32, .*Change 8"),
        ((["row"],), r"Allowed: fp32, .*Change \['row'\]"),
    ],
)
def test_recipes_that_layers_cannot_go_to_are_refused(recipes, says):
    with pytest.raises(ConfigError, match=says):
        AdaptiveSettings(recipes=recipes)


def test_a_list_of_recipes_is_stored_as_a_tuple():
    settings = AdaptiveSettings(recipes=["fp32", "nvfp4"])
    assert settings.recipes == ("fp32", "nvfp4")
    assert settings == AdaptiveSettings(recipes=("fp32", "nvfp4"))


@pytest.mark.parametrize("name", ["by_role", "watch_inputs"])
@pytest.mark.parametrize("value", ["no", None, 1])
def test_switches_are_true_or_false(name, value):
    with pytest.raises(ConfigError, match=f"{name}={value!r}. Allowed: True or False. Change {name}"):
        AdaptiveSettings(**{name: value})


def test_patience_cannot_outgrow_the_longest():
    with pytest.raises(ConfigError, match=r"longest_patience=10 with patience=11.*Raise longest_patience"):
        AdaptiveSettings(patience=11, longest_patience=10)
    assert AdaptiveSettings(patience=10, longest_patience=10).patience == 10


@pytest.mark.parametrize("objective", ["bytes", ["time"], None])
def test_an_unknown_objective_is_refused(objective):
    with pytest.raises(ConfigError, match=r"'time' or 'memory'. Change objective"):
        AdaptiveSettings(objective=objective)


def test_the_other_objective_is_taken():
    assert AdaptiveSettings(objective="memory").to_json()["objective"] == "memory"


@pytest.mark.parametrize(("steps", "every"), [(None, 256), (100, 32), (6400, 100), (10**6, 256)])
def test_a_run_decides_some_64_times(steps, every):
    assert AdaptiveSettings().interval(steps) == every
    assert AdaptiveSettings(decide_every=7).interval(steps) == 7


def test_they_are_plain_values():
    assert json.loads(json.dumps(AdaptiveSettings(recipes=("row",)).to_json()))["recipes"] == ["row"]
