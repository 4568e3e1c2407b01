"""Every stage starts alike, is watched to its end, and says where it was when something is raised."""

from __future__ import annotations

import math

import pytest
import torch
from small_runs import INPUTS, LABELS, batches, net, sgd
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from deepseek_mp.controller.loss_scale import DynamicLossScale
from deepseek_mp.errors import ConfigError, LoaderError
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.trainer.curves import Limits
from deepseek_mp.trainer.stage_training import (
    Setting,
    StageTraining,
    check_run_dirs,
    check_setting,
    same_batches,
    stage_named,
)
from deepseek_mp.trainer.stages import Stage, baseline_stage

BF16 = Stage(name="all", plan=PrecisionPlan.of("bf16"), lowered=("0", "4"))


def setting(loader=None, **changed):
    options = {"device": "cpu", "emulate": True, "progress": False, **changed.pop("options", {})}
    values = {"loader": batches() if loader is None else loader, "steps": 8, "limits": Limits(), "optimizer": sgd}
    return Setting(**{**values, "options": options, "run_dir": None, **changed})


def losses(result):
    return [point.loss for point in result.curve]


def shuffled(**options):
    return DataLoader(TensorDataset(INPUTS, LABELS), batch_size=4, shuffle=True, **options)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("seed", [None, 3])
def test_a_stage_trained_twice_is_the_same_run_with_dropout_and_a_shuffled_order(own, seed):
    generator = torch.Generator().manual_seed(0) if own else None
    training = StageTraining(setting(shuffled(generator=generator), options={"seed": seed}), net())
    baseline = baseline_stage(training.model)
    first, model = training.train(baseline)
    torch.rand(100)
    second, again = training.train(baseline)
    assert losses(first) == losses(second)
    assert len(first.curve) == 8  # more than an epoch
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(training.model.parameters(), net().parameters(), strict=True))


def test_a_loader_that_keeps_its_position_begins_anew():
    class Counting:
        def __init__(self):
            self.epoch = 0

        def __iter__(self):
            self.epoch += 1
            yield from [(x * self.epoch, y) for x, y in batches()]

        def state_dict(self):
            return {"epoch": self.epoch}

        def load_state_dict(self, state):
            self.epoch = state["epoch"]

    training = StageTraining(setting(Counting()), net())
    training.first_batch()
    assert losses(training.train(BF16)[0]) == losses(training.train(BF16)[0])


def test_a_loader_with_other_batches_each_time_is_refused():
    class Drifting:
        def __init__(self):
            self.times = 0

        def __iter__(self):
            self.times += 1
            return iter([(INPUTS * self.times, LABELS)])

    with pytest.raises(LoaderError, match="another first batch"):
        StageTraining(setting(Drifting()), net()).first_batch()
    with pytest.raises(LoaderError, match="gave no batch"):
        StageTraining(setting([]), net()).first_batch()


def test_a_loss_that_is_not_finite_ends_the_stage_and_is_its_verdict(tmp_path):
    def loss_fn(output, target):
        lowered = output.dtype == torch.bfloat16
        made = nn.functional.cross_entropy(output.float(), target)
        return made * math.nan if lowered else made

    training = StageTraining(setting(options={"loss_fn": loss_fn}, run_dir=tmp_path), net())
    baseline, _ = training.train(baseline_stage(training.model))
    result, _ = training.train(BF16, baseline.curve)
    assert baseline.good
    assert not result.good
    assert len(result.curve) == 1
    assert "the loss is nan at step 1" in result.verdict.reason
    assert result.run_dir == str(tmp_path / "all")


def test_a_step_that_the_baseline_could_not_make_either_is_not_held_against_a_stage():
    training = StageTraining(setting(batches(bad={2})), net())
    baseline, _ = training.train(baseline_stage(training.model))
    result, _ = training.train(BF16, baseline.curve)
    assert [point.applied for point in baseline.curve][:5] == [True, True, False, True, True]
    assert result.good, result.verdict.reason
    assert len(result.curve) == len(baseline.curve)


def test_steps_that_are_never_applied_are_a_verdict_too():
    def loss_fn(output, target):
        return nn.functional.cross_entropy(output, target) * math.nan

    training = StageTraining(setting(options={"loss_fn": loss_fn, "max_skipped_steps": 3}), net())
    baseline, _ = training.train(baseline_stage(training.model))
    assert not baseline.good
    assert len(baseline.curve) == 3


def test_a_run_that_is_ended_by_too_many_skips_is_not_good_whatever_its_curve():
    training = StageTraining(setting(), net())
    baseline, _ = training.train(baseline_stage(training.model))
    assert not training._verdict(baseline.curve, baseline.curve, "3 steps in a row were skipped").good


def test_errors_of_the_user_s_code_pass_with_the_stage():
    def loss_fn(output, target):
        raise KeyError("mine")

    training = StageTraining(setting(options={"loss_fn": loss_fn}), net())
    with pytest.raises(KeyError, match="mine") as caught:
        training.train(BF16)
    assert caught.value.__notes__ == ["in stage 'all' of progressive"]
    with pytest.raises(KeyError, match="x"), stage_named("here"):
        raise KeyError("x")


def test_a_policy_object_is_each_stage_s_own():
    policy = DynamicLossScale()
    training = StageTraining(setting(options={"loss_scale_policy": policy}), net())
    one, other = training.trainer("fp16"), training.trainer("fp16")
    assert len({id(policy), id(one.scaler.policy), id(other.scaler.policy)}) == 3
    assert one.model is not other.model


def test_pins_are_no_part_of_the_baseline():
    training = StageTraining(setting(options={"pin": {"4": "bf16"}}), net())
    baseline, _ = training.train(baseline_stage(training.model))
    assert {decision.new for decision in baseline.plan.decisions} == {"fp32"}


@pytest.mark.parametrize(
    ("count", "steps", "window", "epochs"), [(5, 8, 1, 2), (5, 10, 1, 2), (5, 11, 1, 3), (5, 8, 2, 3)]
)
def test_as_many_epochs_as_hold_the_steps(count, steps, window, epochs):
    options = {"gradient_accumulation_steps": window}
    training = StageTraining(setting(batches(count), steps=steps, options=options), net())
    assert training._epochs() == epochs
    result, _ = training.train(BF16)
    assert len(result.curve) == steps


def test_a_loader_without_a_length():
    class Endless:
        def __iter__(self):
            return iter(batches())

    assert len(StageTraining(setting(Endless()), net()).train(BF16)[0].curve) == 8


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"loader": iter(batches())}, "can be iterated once"),
        ({"loader": 3}, "train_loader 3"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.5}, r"steps=2\.5"),
        ({"limits": Limits(tolerance=0.0)}, r"tolerance=0\.0"),
        ({"limits": Limits(tolerance=math.nan)}, "tolerance=nan"),
        ({"limits": Limits(gradient_factor=1.0)}, r"gradient_factor=1\.0"),
        ({"optimizer": torch.optim.SGD(net().parameters())}, "each stage has its own optimizer"),
        ({"options": {"scheduler": "cosine"}}, "each stage has its own scheduler"),
    ],
)
def test_settings_that_no_stage_can_be_trained_with(changed, message):
    with pytest.raises(ConfigError, match=message):
        check_setting(setting(**changed))


def test_a_directory_with_a_run_is_not_used_again(tmp_path):
    check_run_dirs(tmp_path, ["fp32", "all"])
    check_run_dirs(None, ["fp32"])
    StageTraining(setting(run_dir=tmp_path), net()).train(BF16)
    with pytest.raises(ConfigError, match=r"run_dir with a run in .*all"):
        check_run_dirs(tmp_path, ["fp32", "all"])


def test_batches_are_equal_by_their_tensors():
    batch = {"x": torch.tensor([1.0, math.nan]), "y": (torch.arange(3), "text")}
    assert same_batches(batch, {"x": batch["x"].clone(), "y": (torch.arange(3), "other")})
    assert not same_batches(batch, {"x": batch["x"] + 1, "y": batch["y"]})
    assert not same_batches(batch, {"x": batch["x"]})
    assert not same_batches(torch.ones(2), torch.ones(3))
    assert not same_batches(torch.ones(2), torch.ones(2, dtype=torch.float64))
