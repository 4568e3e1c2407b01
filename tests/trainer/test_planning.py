"""Which plan the arguments of a run name, and that 'auto' refuses early what it would refuse late."""

import pytest
import torch
from torch import nn

from deepseek_mp import MixedPrecisionTrainer, PrecisionPlan, backends
from deepseek_mp.costs import CostCache
from deepseek_mp.errors import FormatError, PlanError
from deepseek_mp.nn import Unit
from deepseek_mp.trainer.config import TrainerConfig
from deepseek_mp.trainer.planning import measured_plan, requested_plan

CPU = backends.capabilities("cpu")


def model():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2))


def test_a_named_mode_keeps_the_memory_format_of_the_model_and_puts_pins_first():
    channels_last = model().to(memory_format=torch.channels_last)
    plan = requested_plan(channels_last, TrainerConfig(precision_mode="bf16", pin={"2": "fp32"}), CPU)
    assert (plan.base.name, plan.memory_format, plan.rules[0].pattern) == ("bf16", "channels_last", "2")


def test_a_plan_is_obeyed_with_the_pins_before_its_rules():
    given = PrecisionPlan.of("bf16", {"0": "fp32"})
    plan = requested_plan(model(), TrainerConfig(precision_mode=given, pin={"2": "fp32"}), CPU)
    assert [rule.pattern for rule in plan.rules] == ["2", "0"]


def test_auto_names_no_plan_and_refuses_a_pin_that_fits_nothing():
    assert requested_plan(model(), TrainerConfig(), CPU) is None
    with pytest.raises(PlanError, match="matches no layer"):
        requested_plan(model(), TrainerConfig(pin={"nothing": "fp32"}), CPU)


@pytest.mark.parametrize(
    ("made", "pin", "error", "message"),
    [
        (model(), {"head": "fp32"}, PlanError, "rule 'head' -> fp32 matches no layer"),
        (model().half(), {}, PlanError, r"'0\.weight' is stored in fp16"),
        (nn.Sequential(nn.LazyLinear(2)), {}, PlanError, "parameters without a shape yet"),
        (model(), {"2": "fp9"}, PlanError, "unknown recipe 'fp9'"),
        (model(), {"2": "block"}, FormatError, "recipe 'block' needs fp8_e4m3"),
        (model(), {"2": "tf32"}, FormatError, "does not multiply tf32"),
    ],
)
def test_auto_refuses_early_what_no_plan_would_take(made, pin, error, message):
    with pytest.raises(error, match=message):
        requested_plan(made, TrainerConfig(pin=pin), CPU)
    assert not any(isinstance(module, Unit) for module in made.modules())


@pytest.mark.parametrize("mode", ["fp8", "block"])
def test_a_recipe_is_a_mode(mode):
    plan = requested_plan(model(), TrainerConfig(precision_mode=mode, pin={"2": "fp8"}), CPU)
    assert (plan.base.name, plan.rules[0].recipe.name) == (mode, "fp8")


def test_measuring_takes_the_batch_and_tells_how_far_it_is():
    told = []
    trainer = MixedPrecisionTrainer(model(), pin={"2": "fp32"}, device="cpu")
    trainer.costs = CostCache(disk=False)
    batch = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    plan = measured_plan(trainer, batch, lambda text, share: told.append(share))
    assert plan.rules[0].pattern == "2"
    assert told == sorted(told)
    assert told[-1] == 1.0
