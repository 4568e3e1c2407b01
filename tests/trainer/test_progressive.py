"""The whole path: good stages to the end, one that fails by its format, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from small_runs import batches, net, sgd
from torch import nn

from deepseek_mp import MixedPrecisionTrainer, PrecisionPlan, ProgressiveResult, progressive
from deepseek_mp.errors import ConfigError, LoaderError
from deepseek_mp.report import compare_runs, report_run
from deepseek_mp.testing.faults import Fault, FaultInjector, InjectedError

QUIET = {"device": "cpu", "emulate": True, "progress": False}


def outliers(huge):
    """Batches of a learnable task in which one row is huge, and is not counted in the loss.

    One scale for the whole tensor is that of the huge row, and leaves nothing of the others. With a scale for each row,
    and gradients of weights in BF16, which sum over rows, nothing is lost. In FP32 the row is never noticed.
    """
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(20):
        inputs = torch.randn(16, 16, generator=generator)
        labels = inputs[:, :4].argmax(dim=1)
        inputs[3], labels[3] = huge, -100
        made.append((inputs, labels))
    return made


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16))


def adam(params):
    return torch.optim.Adam(params, lr=0.01)


def test_every_stage_is_good_and_the_model_is_that_of_the_last(tmp_path):
    model = net()
    result = progressive(model, batches(), steps=10, precision="bf16", optimizer=sgd, run_dir=tmp_path, seed=1, **QUIET)
    assert isinstance(result, ProgressiveResult)
    assert [(stage.name, stage.good, len(stage.curve)) for stage in result.stages] == [
        ("fp32", True, 10), ("half", True, 10), ("all", True, 10)
    ]  # fmt: skip
    assert result.complete
    assert result.plan is not None
    assert result.plan.base.name == "bf16"
    assert result.layers == 2
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), net().parameters(), strict=True))
    assert type(model[0]) is nn.Linear

    alone = net()
    MixedPrecisionTrainer(alone, "bf16", optimizer=sgd, seed=1, **QUIET).fit(batches(), epochs=2)
    assert all(torch.equal(p, q) for p, q in zip(result.model.parameters(), alone.parameters(), strict=True))


def test_a_stage_can_be_trained_on(tmp_path):
    result = progressive(net, batches(), steps=4, precision="bf16", optimizer=sgd, run_dir=tmp_path, seed=1, **QUIET)
    onward = MixedPrecisionTrainer(net(), result.plan, optimizer=sgd, run_dir=tmp_path / "all", **QUIET)
    onward.fit(batches(), epochs=2, resume=tmp_path / "all")
    straight = net()
    MixedPrecisionTrainer(straight, "bf16", optimizer=sgd, seed=1, **QUIET).fit(batches(), epochs=2)
    assert all(torch.equal(p, q) for p, q in zip(onward.model.parameters(), straight.parameters(), strict=True))
    again = MixedPrecisionTrainer(result.model, result.plan, optimizer=sgd, **QUIET)
    assert again.fit(batches()).steps_applied == 5


def test_the_stages_are_runs_that_can_be_compared(tmp_path):
    result = progressive(net, batches(), steps=10, precision="bf16", optimizer=sgd, run_dir=tmp_path, seed=1, **QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all", "fp32", "half"]
    found = compare_runs(tmp_path / "fp32", tmp_path / "all")
    assert found.series["loss"].compared == 10
    assert {layer.layer for layer in found.layers} >= {"0", "4"}
    half = report_run(tmp_path / "half")
    assert [step.loss for step in half.steps] == [point.loss for point in result.stages[1].curve]
    assert half.layers.recipes()[result.stages[1].lowered[0]]["fprop"] == "bf16"


@pytest.mark.parametrize(("recipe", "good"), [("tensor", False), ("row_gw_hp", True)])
def test_a_scale_for_a_whole_tensor_loses_to_an_outlier_and_one_for_each_row_does_not(recipe, good):
    data = outliers(huge=1e6)
    own = {"first": PrecisionPlan.of("fp32", {"4": recipe}), "all": PrecisionPlan.of("fp32", {"*": recipe})}
    result = progressive(classifier, data, steps=40, stages=own, optimizer=adam, **QUIET)
    assert result.stages[0].good
    assert result.complete is good
    if good:
        assert [stage.good for stage in result.stages] == [True, True, True]
        return
    last = result.stages[-1]
    assert not last.good
    assert "above the baseline's" in last.verdict.reason or "gradient norms" in last.verdict.reason
    assert result.reason.startswith(f"stage {last.name!r} is not good")
    assert result.plan is result.stages[-2].plan


def test_a_loss_that_becomes_nan_in_the_lower_format_is_a_verdict():
    def loss_fn(output, target):
        made = F.cross_entropy(output.float(), target)
        return made * math.nan if output.dtype == torch.bfloat16 else made

    result = progressive(net, batches(), steps=10, precision="bf16", loss_fn=loss_fn, optimizer=sgd, **QUIET)
    assert [(stage.name, stage.good) for stage in result.stages] == [("fp32", True), ("half", True), ("all", False)]
    assert "the loss is nan at step 1" in result.reason
    assert result.model is not None
    assert result.last_good.name == "half"
    assert all(torch.isfinite(p).all() for p in result.model.parameters())


def test_a_baseline_that_diverges_is_a_verdict_and_leaves_no_model():
    result = progressive(net, batches(5, bad=range(5)), steps=30, precision="bf16", optimizer=sgd, **QUIET)
    assert [stage.name for stage in result.stages] == ["fp32"]
    assert not result.complete
    assert result.model is None
    assert "stage 'fp32' is not good" in result.reason


@pytest.mark.parametrize("where", ["activation", "gradient"])
def test_a_fault_in_one_layer_stops_the_path_at_the_stage_that_has_it(where):
    """From the second step on that the layer runs in BF16 it overflows."""
    model = net()
    plans = {"without": PrecisionPlan.of("fp32", {"0": "bf16"}), "with": PrecisionPlan.of("bf16")}
    with FaultInjector(model).add(Fault(kind="inf", where=where, module="4", steps={1})) as faults:

        def loss_fn(output, target):
            faults.step = int(output.dtype == torch.bfloat16)
            return F.cross_entropy(output.float(), target)

        result = progressive(model, batches(), steps=8, stages=plans, loss_fn=loss_fn, optimizer=sgd, **QUIET)
    assert [(stage.name, stage.good) for stage in result.stages] == [("fp32", True), ("without", True), ("with", False)]
    expected = {"activation": "the loss is", "gradient": "the gradients are not finite at step 2"}
    assert expected[where] in result.reason
    assert result.last_good.name == "without"


def test_an_exception_of_the_user_s_code_names_the_stage():
    def loss_fn(output, target):
        if output.dtype == torch.bfloat16:
            raise InjectedError("not in this format")
        return F.cross_entropy(output, target)

    with pytest.raises(InjectedError, match="not in this format") as caught:
        progressive(net, batches(), steps=4, stages={"low": "bf16"}, loss_fn=loss_fn, optimizer=sgd, **QUIET)
    assert caught.value.__notes__ == ["in stage 'low' of progressive"]

    def broken():
        raise KeyError("no such file")

    with pytest.raises(KeyError, match="no such file") as caught:
        progressive(broken, batches(), steps=4, **QUIET)
    assert caught.value.__notes__ == ["in make_model of progressive"]


def test_auto_that_has_nothing_to_lower_trains_the_baseline_and_says_why(monkeypatch):
    plan = PrecisionPlan.of("fp32")
    monkeypatch.setattr("deepseek_mp.trainer.loop.measured_plan", lambda *args, **options: plan)
    result = progressive(net, batches(), steps=5, optimizer=sgd, **QUIET)
    assert [stage.name for stage in result.stages] == ["fp32"]
    assert result.complete
    assert result.reason == "'auto' chose fp32"
    assert result.model is not None


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"make_model": 3}, ConfigError, "make_model=3"),
        ({"make_model": lambda: 3}, ConfigError, "make_model that gave 3"),
        ({"steps": 0}, ConfigError, "steps=0"),
        ({"stages": (2.0,)}, ConfigError, "rising shares"),
        ({"precision": "bf17"}, ConfigError, "Did you mean 'bf16'"),
        ({"train_loader": iter([])}, LoaderError, "can be iterated once"),
        ({"train_loader": []}, LoaderError, "gave no batch"),
        ({"grad_norm": 1.0}, ConfigError, "option 'grad_norm'.*Did you mean 'max_grad_norm'"),
        ({"ema_decay": 0.9}, ConfigError, "option 'ema_decay'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(changed, error, message):
    arguments = {"make_model": net, "train_loader": batches(), "steps": 4, **QUIET, **changed}
    with pytest.raises(error, match=message):
        progressive(arguments.pop("make_model"), arguments.pop("train_loader"), **arguments)


def test_a_run_directory_that_was_used_is_refused(tmp_path):
    progressive(net, batches(), steps=2, stages={"low": "bf16"}, optimizer=sgd, run_dir=tmp_path, **QUIET)
    with pytest.raises(ConfigError, match="run_dir with a run in"):
        progressive(net, batches(), steps=2, stages={"other": "bf16"}, optimizer=sgd, run_dir=tmp_path, **QUIET)
