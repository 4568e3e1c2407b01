"""The policies train in what they are called, FP32's repetition starts one digit away, and pure BF16 is pure."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from deepseek_mp.workloads.stress_policies import POLICIES, PureBF16, mean_loss
from deepseek_mp.workloads.stress_scenarios import SCENARIOS, Scenario, Size

CPU = torch.device("cpu")
TINY = Size(width=128, hidden=128, layers=1, batch_size=16, examples=64, steps=4, gain=1.0)
LAYER = "blocks.0.up"


@pytest.fixture
def scenario() -> Scenario:
    return SCENARIOS["stagnation"](TINY)


@pytest.mark.parametrize(
    ("name", "recipe"),
    [("fp32", "fp32"), ("bf16_amp", "bf16"), ("fp16_amp", "fp16"), ("fp8_tensor", "tensor"), ("fp8_block", "block")],
)
def test_a_policy_trains_its_layers_in_its_recipe(scenario: Scenario, name: str, recipe: str) -> None:
    trainee = POLICIES[name](scenario, scenario.model(0), CPU)
    assert {d.layer: d.new for d in trainee.plan.decisions}[LAYER] == recipe
    before = trainee.model.get_parameter(f"{LAYER}.weight").detach().clone()
    assert trainee.step(scenario.data(0).train.batch(0, 0)).status == "applied"
    assert not torch.equal(trainee.model.get_parameter(f"{LAYER}.weight"), before)
    assert trainee.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * scenario.schedule(1))


def test_fp32s_repetition_starts_from_the_next_numbers(scenario: Scenario) -> None:
    plain = scenario.model(0)
    nudged = POLICIES["fp32_nudged"](scenario, scenario.model(0), CPU).model
    for a, b in zip(plain.parameters(), nudged.parameters(), strict=True):
        assert torch.equal(torch.nextafter(a.detach(), torch.tensor(math.inf)), b)


def test_pure_bf16_has_nothing_wider(scenario: Scenario) -> None:
    trainee = PureBF16(scenario, scenario.model(0), CPU)
    trainee.step(scenario.data(0).train.batch(0, 0))
    state = trainee.optimizer.state[next(trainee.model.parameters())]
    kept = [*trainee.model.parameters(), *(p.grad for p in trainee.model.parameters()), state["exp_avg"]]
    assert {tensor.dtype for tensor in kept} == {torch.bfloat16}
    assert trainee.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * scenario.schedule(1))


def test_pure_bf16_loses_updates_below_half_a_step_between_numbers(scenario: Scenario) -> None:
    trainee = PureBF16(scenario, scenario.model(0), CPU)
    weight = trainee.model.get_parameter("norm.weight")
    trainee.step(scenario.data(0).train.batch(0, 0))  # 1e-3 is less than half of 2**-8 below one
    assert weight.detach().eq(1).all()


def test_pure_bf16_skips_a_step_that_is_not_finite(scenario: Scenario) -> None:
    trainee = PureBF16(scenario, scenario.model(0), CPU)
    inputs, target = scenario.data(0).train.batch(0, 0)
    before = [p.detach().clone() for p in trainee.model.parameters()]
    assert trainee.step((inputs * math.inf, target)).status == "skipped"
    assert all(torch.equal(a, b) for a, b in zip(before, trainee.model.parameters(), strict=True))
    assert trainee.optimizer.param_groups[0]["lr"] == 1e-3


def test_the_mean_is_over_examples_also_of_unequal_batches() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    batches = [(torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)), (torch.tensor([[6.0]]), torch.zeros(1, 1))]
    assert mean_loss(model, batches, lambda y, target: (y - target).mean()) == pytest.approx(3.0)
