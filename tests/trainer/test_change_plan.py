"""Another precision between two steps of one run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from deepseek_mp import MixedPrecisionTrainer, PrecisionPlan
from deepseek_mp.errors import ConfigError, PlanError
from deepseek_mp.nn import current_plan
from deepseek_mp.trainer.callbacks import Callback


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 8))


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, 128, generator=generator), torch.randint(0, 8, (32,), generator=generator)


def make(mode, body=None, **options):
    options = {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), "emulate": True} | options
    return MixedPrecisionTrainer(model() if body is None else body, mode, device="cpu", **options)


@pytest.mark.parametrize("plans", [("bf16", "fp32"), ("fp32", "bf16"), ("bf16", "block"), ("delayed", "bf16")], ids=str)
def test_training_goes_on_as_if_it_had_begun_in_the_new_plan(plans):
    trainer = make(plans[0])
    for seed in range(2):
        trainer.step(batch(seed))
    trainer.settle()
    weights, moments = copy.deepcopy(trainer.model.state_dict()), copy.deepcopy(trainer.optimizer.state_dict())
    changed = trainer.change_plan(plans[1])
    assert trainer.plan is changed
    assert changed.base.name == plans[1]
    assert current_plan(trainer.model) == changed
    other = make(plans[1])
    other.model.load_state_dict(weights)
    other.optimizer.load_state_dict(moments)
    for seed in range(2, 5):
        assert trainer.step(batch(seed)).loss == other.step(batch(seed)).loss
    assert trainer.steps_applied == 5


@pytest.mark.usefixtures("backward")  # code is counted and not looked at, so it need not become C++
def test_a_plan_that_was_compiled_before_is_not_compiled_again():
    trainer, graphs = make("bf16", compile=True), []
    for plan in ("bf16", "block", "bf16", "block"):
        trainer.change_plan(plan)
        assert [trainer.step(batch(seed)).status for seed in range(2)] == ["applied"] * 2
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] < graphs[1] == graphs[2] == graphs[3]


def test_fp16_brings_its_loss_scale_and_takes_it_away():
    trainer = make("bf16", loss_scale_policy=256.0)
    trainer.step(batch(0))
    trainer.change_plan("fp16")
    assert trainer.step(batch(1)).scale == 256.0
    trainer.change_plan("fp32")
    assert trainer.step(batch(2)).scale == 1.0


def test_pins_are_kept_unless_others_are_given():
    trainer = make("bf16", pin={"0": "fp32"})
    trainer.step(batch(0))
    assert trainer.change_plan("fp16").recipe_for("0").name == "fp32"
    assert trainer.change_plan("fp16", pin={"2": "fp32"}).recipe_for("0").name == "fp16"
    assert trainer.change_plan(PrecisionPlan.of("bf16"), pin={}).recipe_for("2").name == "bf16"


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ("bf61", ConfigError, "Did you mean 'bf16'"),
        ("auto", ConfigError, "Name one"),
        (PrecisionPlan.of("bf16", {"nowhere": "fp32"}), PlanError, "nowhere"),
    ],
)
def test_a_refused_change_changes_nothing(plan, error, message):
    trainer, untouched = make("bf16"), make("bf16")
    for one in (trainer, untouched):
        one.step(batch(0))
    before = trainer.plan
    with pytest.raises(error, match=message):
        trainer.change_plan(plan)
    assert trainer.plan is before
    assert current_plan(trainer.model) == before
    assert trainer.step(batch(1)).loss == untouched.step(batch(1)).loss


def test_within_a_window_and_before_the_first_plan_it_is_refused():
    trainer = make("bf16", gradient_accumulation_steps=2)
    trainer.step(batch(0))
    with pytest.raises(ConfigError, match="between optimizer steps"):
        trainer.change_plan("fp32")
    trainer.step(batch(1))
    trainer.change_plan("fp32")
    with pytest.raises(ConfigError, match="once a plan is in force"):
        make("auto").change_plan("fp32")


class AtEpochsEnd(Callback):
    def on_epoch_end(self, trainer, *_):
        trainer.change_plan("fp32")


def test_a_callback_changes_the_plan_at_the_end_of_an_epoch():
    trainer = make("bf16", callbacks=[AtEpochsEnd()])
    formats = []
    trainer.model[0].register_forward_hook(lambda *args: formats.append(args[-1].dtype))
    result = trainer.fit([batch(0), batch(1)], epochs=2)
    assert result.plan.base.name == "fp32"
    assert formats[:2] + formats[-2:] == [torch.bfloat16] * 2 + [torch.float32] * 2
