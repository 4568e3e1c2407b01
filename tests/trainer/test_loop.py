"""The trainer: what goes along with its steps, which plan it has, what it refuses, and the parts around it."""

from __future__ import annotations

import copy
import random
import warnings
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_runs import INPUTS, LABELS, accuracy, batches, make, net, same_models, sgd
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

from deepseek_mp import Decision, MixedPrecisionTrainer, PrecisionPlan, Reason
from deepseek_mp.controller import NoLossScale
from deepseek_mp.errors import ConfigError, FormatError, LoaderError, PlanError
from deepseek_mp.nn import current_plan
from deepseek_mp.records import read_run
from deepseek_mp.trainer import planning

# -- what goes along with the steps ------------------------------------------------------------------------------


def test_a_scheduler_advances_on_applied_steps_only():
    trainer = make(scheduler=lambda o: LambdaLR(o, lambda step: 0.5**step))
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns where a schedule is ahead of its optimizer
        for batch in batches(4, bad=[0, 2]):
            trainer.step(batch)
            rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == [0.1, 0.05, 0.05, 0.025]


def test_a_scheduler_object_advances_like_one_made_by_a_function():
    model = net()
    optimizer = sgd(model.parameters())
    trainer = make(model=model, optimizer=optimizer, scheduler=LambdaLR(optimizer, lambda step: 0.5**step))
    trainer.fit(batches(3))
    assert trainer.optimizer is optimizer
    assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**3


def test_the_average_advances_on_applied_steps_and_is_what_is_evaluated():
    trainer = make(ema_decay=0.5)
    trainer.fit(batches())
    kept = {name: value.clone() for name, value in trainer.ema.values.items()}
    assert trainer.step(batches(1, bad=[0])[0]).status == "skipped"
    assert all(torch.equal(value, kept[name]) for name, value in trainer.ema.values.items())
    own = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    averaged = net()
    averaged.load_state_dict(trainer.model.state_dict())
    averaged.load_state_dict(trainer.ema.values, strict=False)
    averaged.eval()
    expected = F.cross_entropy(averaged(INPUTS[:20]), LABELS[:20]).item()
    assert trainer.evaluate(batches())["loss"] == pytest.approx(expected)
    assert torch.equal(trainer.predict(INPUTS), averaged(INPUTS))
    assert all(torch.equal(p, own[name]) for name, p in trainer.model.named_parameters())
    assert not torch.equal(averaged[0].weight, own["0.weight"])


def test_evaluation_and_prediction_leave_the_run_alone():
    plain, disturbed = make("bf16"), make("bf16", ema_decay=0.9)
    for trainer in (plain, disturbed):
        torch.manual_seed(3)
        for batch in batches():
            trainer.step(batch)
            if trainer is disturbed:
                trainer.evaluate(batches())
                trainer.predict(batch)
    assert same_models(plain, disturbed)
    assert disturbed.model.training


def test_evaluation_is_in_eval_mode_without_gradients_in_the_plans_region():
    trainer = make("bf16")
    seen = []
    trainer.model[4].register_forward_hook(
        lambda module, args, output: seen.append((output.dtype, output.requires_grad, trainer.model.training))
    )
    trainer.evaluate(batches(1))
    output = trainer.predict(INPUTS)
    assert seen == [(torch.bfloat16, False, False)] * 2
    assert torch.equal(output, trainer.predict((INPUTS, LABELS)))


def test_evaluation_that_fails_gives_the_model_back():
    trainer = make(ema_decay=0.5)
    trainer.fit(batches())
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(LoaderError, match="nothing to evaluate"):
        trainer.evaluate([])
    assert trainer.model.training
    assert all(torch.equal(v, before[name]) for name, v in trainer.model.state_dict().items())


def test_a_seed_makes_a_run():
    runs = [make(model=net(), seed=seed) for seed in (3, 3, 4)]
    for trainer in runs:
        torch.manual_seed(trainer.config.seed)
        trainer.fit(DataLoader(TensorDataset(INPUTS, LABELS), batch_size=4, shuffle=True))
    assert same_models(runs[0], runs[1])
    assert not same_models(runs[0], runs[2])
    drawn = []
    for _ in range(2):
        make(seed=11)
        drawn.append((random.random(), float(np.random.random()), float(torch.rand(()))))
    assert drawn[0] == drawn[1]


# -- the plan -------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """What was asked to be measured; the answer is bf16."""
    calls = []

    def choose(model, run, **options):
        calls.append(options | {"training": model.training, "loss": run().item()})
        whole = Decision(layer="", old="fp32", new="bf16", reason=Reason.MEASURED_FASTEST)
        return replace(PrecisionPlan.of("bf16", options["pins"]), decisions=(whole,))

    monkeypatch.setattr(planning, "choose_plan", choose)
    return calls


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_a_named_mode_is_in_force_at_once(mode):
    trainer = make(mode, pin={"4": "fp32"})
    assert trainer.plan.base.name == mode
    assert current_plan(trainer.model) == trainer.plan
    assert [d.layer for d in trainer.plan.decisions] == ["0", "1", "4"]
    assert (trainer.scaler.get_scale() == 64.0) == (mode == "fp16")


def test_a_plan_is_obeyed_and_pins_come_before_it():
    trainer = make(PrecisionPlan.of("bf16", {"*": "bf16"}), pin={"4": "fp32"})
    assert [str(d.new) for d in trainer.plan.decisions] == ["bf16", "bf16", "fp32"]


def test_auto_measures_once_at_the_first_batch(measured):
    trainer = make("auto", pin={"4": "fp32"})
    with pytest.raises(ConfigError, match=r"plan before anything was measured.*Call fit or step first"):
        _ = trainer.plan
    result = trainer.fit(batches(), 2)
    assert len(measured) == 1
    assert measured[0]["training"] is True
    assert measured[0]["pins"] == {"4": "fp32"}
    assert measured[0]["emulate"] is True
    assert result.plan.base.name == "bf16"
    assert result.plan.decisions[0].reason == Reason.MEASURED_FASTEST
    assert type(trainer.scaler.policy) is NoLossScale


def test_evaluation_before_anything_was_measured_is_fp32(measured):
    trainer = make("auto")
    dtypes = []
    trainer.model[4].register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    trainer.evaluate(batches(1))
    trainer.step(batches(1)[0])
    assert dtypes[0] == torch.float32
    assert dtypes[-1] == torch.bfloat16
    assert len(measured) == 1


def test_a_fit_that_does_nothing_has_a_plan_all_the_same(measured):
    assert make("auto", pin={"4": "fp32"}).fit(batches(), 0).plan.base.name == "fp32"
    assert measured == []


def test_the_real_measurement_gives_a_plan_that_trains(monkeypatch):
    monkeypatch.setenv("DEEPSEEK_MP_CACHE", "off")
    trainer = make("auto")
    result = trainer.fit(batches(), 1)
    assert result.steps_applied == 5
    assert result.plan.decisions[0].layer == ""


# -- what is refused -------------------------------------------------------------------------------------------------


def half(model):
    return model.half()


def frozen(model):
    return model.requires_grad_(False)


def lazy(model):
    return nn.Sequential(nn.LazyLinear(4), model)


REFUSED = {
    "mode": ({"mode": "bf61"}, ConfigError, "precision_mode='bf61'.*Did you mean 'bf16'"),
    "fp8": ({"mode": "fp8", "emulate": False}, FormatError, "recipe 'row' needs fp8_e4m3.*the nearest it has"),
    "kernels": ({"kernels": "cutlass"}, ConfigError, "kernels='cutlass'"),
    "format": ({"mode": "tf32"}, FormatError, "does not multiply tf32.*the nearest it has"),
    "layer": ({"mode": PrecisionPlan.of("fp32", {"head": "fp32"})}, PlanError, "'head' -> fp32 matches no layer"),
    "pin": ({"pin": {"4.wieght": "fp32"}}, PlanError, r"'4\.wieght' -> fp32 matches no layer"),
    "recipe": ({"pin": {"4": "bf61"}}, ConfigError, "unknown recipe 'bf61'"),
    "policy": ({"loss_scale_policy": "dynamik"}, ConfigError, "loss_scale_policy='dynamik'"),
    "scale": ({"loss_scale_policy": -1.0}, ConfigError, r"initial=-1\.0"),
    "loss": ({"loss_fn": "mse"}, ConfigError, "loss_fn='mse'"),
    "optimizer": ({"optimizer": "sgd"}, ConfigError, "optimizer='sgd'"),
    "broken optimizer": ({"optimizer": lambda params: 1 / 0}, ZeroDivisionError, "division by zero"),
    "scheduler": ({"scheduler": "cosine"}, ConfigError, "scheduler='cosine'"),
    "accumulation": ({"gradient_accumulation_steps": 0}, ConfigError, "gradient_accumulation_steps=0"),
    "compile": ({"compile": "regional"}, ConfigError, "'regional' on a model without repeated blocks"),
    "callbacks": ({"callbacks": [print]}, ConfigError, "callbacks with <built-in"),
    "device": ({"device": "gpu"}, ConfigError, "device 'gpu' is not known"),
    "meta device": ({"device": "meta"}, ConfigError, "device 'meta'"),
    "seed": ({"seed": "x"}, ConfigError, "seed='x'"),
    "fp16 parameters": ({"change": half}, PlanError, r"'0\.weight' is stored in fp16.*model\.float\(\)"),
    "frozen": ({"change": frozen}, ConfigError, "without trainable parameters"),
    "lazy": ({"change": lazy}, PlanError, "'0' has parameters without a shape yet"),
}  # fmt: skip


def hook_counts(model):
    return [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]


@pytest.mark.parametrize("mode", ["bf16", "auto"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_construction_is_one_error_and_changes_nothing(tmp_path, case, mode):
    options, error, message = REFUSED[case]
    options = {"mode": mode, "seed": 7, "run_dir": tmp_path / "run", **options}
    model = options.pop("change", lambda model: model)(net())
    before = dict(model.state_dict())
    values = {name: value.clone() for name, value in before.items() if case != "lazy"}
    classes, hooks = [type(module) for module in model.modules()], hook_counts(model)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with pytest.raises(error, match=message) as caught:
        make(model=model, **options)
    assert error is ZeroDivisionError or "Allowed: " in str(caught.value)
    assert [type(module) for module in model.modules()] == classes
    assert current_plan(model) is None
    for name, value in values.items():
        assert torch.equal(model.state_dict()[name], value)
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())
    assert hook_counts(model) == hooks
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_loader": None}, "loader None"),
        ({"epochs": None}, "epochs=None"),
        ({"epochs": -1}, "epochs=-1"),
        ({"max_steps": 1.5}, r"max_steps=1\.5"),
        ({"metrics": [accuracy]}, r"metrics=\["),
    ],
)
def test_arguments_that_are_none_are_refused(tmp_path, arguments, message):
    trainer = make(run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match=rf"{message}.*Allowed"):
        trainer.fit(**{"train_loader": batches(), **arguments})
    assert trainer.steps_attempted == 0
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_no_module_is_refused():
    with pytest.raises(ConfigError, match=r"model='resnet'.*Allowed: a torch\.nn\.Module"):
        MixedPrecisionTrainer("resnet")


@pytest.mark.parametrize("mode", ["fp32", "auto"])
def test_one_of_several_processes_is_refused(monkeypatch, mode):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="more than one process"):
        make(mode)


def test_a_model_may_be_handed_to_a_second_trainer():
    model = net()
    make("bf16", model=model).fit(batches(2))
    second = make("fp32", model=model)
    assert second.plan.base.name == "fp32"
    assert second.fit(batches(2)).steps_applied == 2


def test_close_settles_and_ends_the_records_of_a_loop_of_ones_own(tmp_path):
    model = nn.Sequential(nn.Linear(4, 2))
    trainer = MixedPrecisionTrainer(model, "fp32", device="cpu", run_dir=tmp_path)
    trainer.step((torch.ones(3, 4), torch.zeros(3, dtype=torch.long)))
    trainer.close()
    attempt = read_run(tmp_path).attempts[-1]
    assert attempt.outcome == "completed"
    assert trainer.steps_applied == 1


def test_trials_of_auto_are_no_steps_of_the_monitor():
    trainer = MixedPrecisionTrainer(nn.Sequential(nn.Linear(4, 2)), "auto", device="cpu")
    for _ in range(3):
        trainer.step((torch.ones(3, 4), torch.zeros(3, dtype=torch.long)))
    assert trainer.monitor.log_precision_usage().steps == 3


def test_the_output_is_not_kept_alive_during_backward():
    alive = []

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, inputs):
            inputs.requires_grad_().register_hook(lambda grad: alive.append(kept() is not None))
            output = self.layer(inputs)
            kept = weakref.ref(output)
            return output

    trainer = MixedPrecisionTrainer(Head(), "fp32", device="cpu", loss_fn=lambda output, target: output.exp().mean())
    trainer.step(((torch.ones(3, 4),), torch.zeros(3)))
    assert alive == [False]
