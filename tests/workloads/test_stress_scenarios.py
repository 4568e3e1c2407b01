"""The scenarios are whole and deterministic, name layers that exist, and without stress they have none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from deepseek_mp.workloads.stress_hooks import Stress
from deepseek_mp.workloads.stress_policies import POLICIES
from deepseek_mp.workloads.stress_scenarios import LARGE, SCENARIOS, SMALL, Size

TINY = Size(width=16, hidden=32, layers=2, batch_size=16, examples=64, steps=8, gain=1.0)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_scenario_is_whole(name: str) -> None:
    scenario = SCENARIOS[name](TINY)
    model = scenario.model(0)
    assert scenario.name == name
    assert scenario.stresses
    assert scenario.breaks in POLICIES
    assert all(isinstance(model.get_submodule(layer), nn.Linear) for layer in scenario.layers)
    assert scenario.steps == 8
    with scenario.stress(model, scenario.optimizer(model.parameters())) as stress:
        stress.begin(7)
        inputs, target = scenario.data(0).train.batch(0, 0)
        assert torch.isfinite(scenario.loss_fn(model(inputs), target))


@pytest.mark.parametrize("name", SCENARIOS)
def test_everything_follows_from_the_seed(name: str) -> None:
    first, again = SCENARIOS[name](TINY), SCENARIOS[name](TINY)
    for a, b in zip(first.model(3).parameters(), again.model(3).parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(first.data(3).train.batch(0, 1), again.data(3).train.batch(0, 1), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", SCENARIOS)
def test_calm_is_the_same_run_without_the_stress(name: str) -> None:
    stressed, calm = SCENARIOS[name](TINY), SCENARIOS[name](TINY, calm=True)
    model = calm.model(0)
    assert type(calm.stress(model, calm.optimizer(model.parameters()))) is Stress
    assert torch.equal(calm.data(0).train.batch(0, 0)[0], stressed.data(0).train.batch(0, 0)[0])
    differs = {
        "stress": type(stressed.stress(model, calm.optimizer(model.parameters()))) is not Stress,
        "data": not torch.equal(calm.data(0).train.batch(0, 0)[1], stressed.data(0).train.batch(0, 0)[1]),
        "schedule": calm.schedule(8) != stressed.schedule(8),
    }
    assert sum(differs.values()) == 1, differs


def test_the_rate_falls_from_one_to_its_end_and_stays_there() -> None:
    rates = [SCENARIOS["stagnation"](TINY).schedule(step) for step in range(12)]
    assert rates[0] == 1
    assert rates[8] == pytest.approx(0.02)
    assert rates[9:] == rates[8:-1]
    assert rates[:9] == sorted(rates[:9], reverse=True)
    assert SCENARIOS["stagnation"](TINY, calm=True).schedule(8) == 1


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_blocks_of_fp8_fit_the_weights(size: Size) -> None:
    assert size.width % 128 == 0
    assert size.hidden % 128 == 0
    assert size.batch_size % 128 == 0
