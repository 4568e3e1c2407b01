"""Stopping and resuming: a run that was stopped at any step equals one that was not, bit by bit.

The letters and numbers in the names are those of the project's list of faults, section F.
"""

from __future__ import annotations

import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, ReduceLROnPlateau, StepLR
from torch.utils.data import DataLoader, Dataset

from deepseek_mp import Callback, Decision, MixedPrecisionTrainer, PrecisionPlan, Reason
from deepseek_mp.controller import DynamicLossScale
from deepseek_mp.errors import CheckpointError, ConfigError, LossScaleError
from deepseek_mp.records import read_run
from deepseek_mp.trainer import planning, resume
from deepseek_mp.trainer.checkpoint import read_checkpoint

EPOCHS = 4
STEPS = EPOCHS * 3  # 7 batches an epoch, 3 to a window: two full windows and one of a single batch


@pytest.fixture
def folder():
    """A directory in memory where there is one: many saves there do not wait for a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as path:
        yield Path(path)


class Noisy(Dataset):
    """20 samples, each with noise from the global generator of whoever loads it."""

    def __init__(self):
        self.inputs = torch.randn(20, 6, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return self.inputs[index] + 0.01 * torch.randn(6), self.inputs[index, :3].argmax()


class Stateful:
    """A loader that keeps its position, its order and its generator, a tensor among them, in a state_dict."""

    def __init__(self):
        self.data, self.generator_state, self.next, self.order = Noisy(), None, 0, None
        self.own = torch.Generator().manual_seed(9)

    def __iter__(self):
        if self.order is None:
            self.order, self.next = torch.randperm(20, generator=self.own).tolist(), 0
        while self.next < 20:
            taken, self.next = self.order[self.next : self.next + 3], self.next + 3
            rows = [self.data[i] for i in taken]
            yield torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])
        self.order = None

    def state_dict(self):
        return {"own": self.own.get_state(), "next": self.next, "order": self.order}

    def load_state_dict(self, state):
        self.own.set_state(state["own"])
        self.next, self.order = state["next"], state["order"]


class Plain:
    """A class with a generator function and no length, shuffling with Python's and torch's generators."""

    def __iter__(self):
        data, order = Noisy(), torch.randperm(20).tolist()
        random.shuffle(order)
        for start in range(0, 20, 3):
            rows = [data[i] for i in order[start : start + 3]]
            yield torch.stack([x for x, _ in rows]) + float(np.random.normal()), torch.stack([y for _, y in rows])


LOADERS = {
    "global": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True),
    "own": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "workers": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True, num_workers=2),
    "stateful": Stateful,
    "plain": Plain,
}


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def adamw(params):
    return torch.optim.AdamW(params, lr=0.02)


def halving(optimizer):
    return StepLR(optimizer, 2, gamma=0.7)


def make(model=None, mode="fp16", **options):
    """A trainer with everything that has a state. The scale overflows at first and grows again soon."""
    options = {
        "loss_scale_policy": DynamicLossScale(2.0**17, interval=2),
        "optimizer": adamw,
        "scheduler": halving,
        "gradient_accumulation_steps": 3,
        "max_grad_norm": 1.0,
        "ema_decay": 0.9,
        "emulate": True,
        "device": "cpu",
    } | options
    return MixedPrecisionTrainer(net() if model is None else model, mode, **options)


def other_process(seed):
    """The generators as another process would have them."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def state(trainer):
    """Everything a trainer knows, in values that compare bit by bit."""
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    groups = [
        {k: v for k, v in g.items() if k != "params"} | {"params": [names[id(p)] for p in g["params"]]}
        for g in trainer.optimizer.param_groups
    ]
    tensors = {f"model.{name}": value for name, value in trainer.model.state_dict().items()}
    for param, entry in trainer.optimizer.state.items():
        tensors |= {f"optimizer.{names[id(param)]}.{key}": value for key, value in entry.items()}
    if trainer.ema is not None:
        tensors |= {f"ema.{name}": value for name, value in trainer.ema.values.items()}
    return {
        "tensors": {name: (str(t.dtype), t.detach().numpy().tobytes()) for name, t in tensors.items()},
        "groups": groups,
        "scaler": trainer.scaler.state_dict(),
        "scheduler": repr(trainer.scheduler.state_dict()) if trainer.scheduler else None,
        "counters": (trainer.steps_attempted, trainer.steps_applied, trainer.position.epoch, trainer.position.batch),
        "history": [{k: repr(v) for k, v in e.items() if "second" not in k} for e in trainer.history],
        "classes": [type(module) for module in trainer.model.modules()],
        "random": (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()),
        "plan": trainer._plan,
    }


def assert_same(one, two):
    for key in one:
        assert one[key] == two[key], key


def curve(path):
    """What the run directory says of each step, but for times and memory."""
    kept = ("step", "applied", "epoch", "status", "loss", "scale", "grad_norm", "lr", "reason", "skipped", "val_loss")
    return [{k: repr(line[k]) for k in kept if k in line} for line in read_run(path).metrics]


def stopped_and_resumed(loader, folder, step, build=make, **fit):
    """A run stopped after `step` applied steps, then resumed by a trainer that starts from other values."""
    other_process(5)
    first = build(run_dir=folder)
    first.fit(loader(), EPOCHS, max_steps=step, **fit)
    first.save(folder)
    other_process(1000 + step)
    second = build(model=net(seed=77), run_dir=folder)
    second.fit(loader(), EPOCHS, resume=folder, **fit)
    return second


def straight(loader, folder, build=make, **fit):
    other_process(5)
    trainer = build(run_dir=folder)
    trainer.fit(loader(), EPOCHS, **fit)
    return trainer


# -- F13: nothing is missing in a checkpoint -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "steps"),
    [("global", range(1, 12)), ("own", range(1, 12)), ("stateful", range(1, 12)), ("plain", [1, 2, 3, 6])],
)
def test_f13_a_run_stopped_after_any_step_continues_bit_identically(folder, kind, steps):
    expected = straight(LOADERS[kind], folder / "straight")
    scales = [line["scale"] for line in read_run(folder / "straight").metrics if "scale" in line]
    assert expected.steps_attempted == STEPS
    assert 0 < expected.steps_applied < STEPS, "steps were skipped, and not all"
    assert any(a < b for a, b in pairwise(scales)), "the scale fell, and grew again"
    values, lines = state(expected), curve(folder / "straight")
    for step in steps:
        if step > expected.steps_applied:
            break
        resumed = stopped_and_resumed(LOADERS[kind], folder / str(step), step)
        assert_same(values, state(resumed))
        assert curve(folder / str(step)) == lines


def test_f13_worker_processes_load_the_same_batches_after_a_resume(folder):
    expected = straight(LOADERS["workers"], folder / "straight")
    resumed = stopped_and_resumed(LOADERS["workers"], folder / "stopped", 2)
    assert_same(state(expected), state(resumed))
    assert curve(folder / "stopped") == curve(folder / "straight")


def plateau(optimizer):
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0.5)


def bf16(**options):
    return make(mode="bf16", scheduler=plateau, **options)


@pytest.mark.parametrize("step", [1, 3, 4, 5])
def test_f13_the_epoch_loss_a_plateau_scheduler_sees_does_not_depend_on_a_resume(folder, step):
    expected = straight(LOADERS["own"], folder / "straight", bf16)
    assert expected.optimizer.param_groups[0]["lr"] < 0.02
    resumed = stopped_and_resumed(LOADERS["own"], folder / "stopped", step, bf16)
    assert_same(state(expected), state(resumed))
    assert curve(folder / "stopped") == curve(folder / "straight")


@pytest.mark.parametrize("policy", ["predictive", 256.0, "none"])
def test_f13_every_loss_scale_policy_continues(folder, policy):
    def build(**options):
        return make(loss_scale_policy=policy, **options)

    expected = straight(LOADERS["own"], folder / "straight", build)
    resumed = stopped_and_resumed(LOADERS["own"], folder / "stopped", 4, build)
    assert_same(state(expected), state(resumed))


class Whitened(torch.optim.Optimizer):
    """Keeps a matrix for each dimension of a parameter, as Shampoo does."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.01})

    @torch.no_grad()
    def step(self):
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            grad, state = parameter.grad.reshape(len(parameter), -1), self.state[parameter]
            state["left"] = state.get("left", 0.0) + grad @ grad.T
            state["right"] = state.get("right", 0.0) + grad.T @ grad
            parameter -= 0.01 * torch.tanh(state["left"] @ grad @ state["right"]).view_as(parameter)


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.02, fused=True, amsgrad=True),
    "nadam": lambda params: torch.optim.NAdam(params, lr=0.02),
    "adagrad": lambda params: torch.optim.Adagrad(params, lr=0.02),
    "asgd": lambda params: torch.optim.ASGD(params, lr=0.02),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=0.02),
    "matrices": Whitened,
    "groups": lambda params: torch.optim.AdamW([{"params": p, "lr": 0.01 * (i + 1)} for i, p in enumerate(params)]),
    "tensor lr": lambda params: torch.optim.AdamW(params, lr=torch.tensor(0.02)),
}
SCHEDULERS = {
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 0.9**step),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=20),
    "milestones": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3]),
    "sequence": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer, [torch.optim.lr_scheduler.LinearLR(optimizer), CosineAnnealingLR(optimizer, 9)], [3]
    ),
}


@pytest.mark.parametrize(
    ("optimizer", "scheduler"), [*((name, "lambda") for name in OPTIMIZERS), *(("sgd", name) for name in SCHEDULERS)]
)
def test_f13_optimizers_and_schedulers_continue(folder, optimizer, scheduler):
    def build(**options):
        return make(mode="fp32", optimizer=OPTIMIZERS[optimizer], scheduler=SCHEDULERS[scheduler], **options)

    expected = straight(LOADERS["own"], folder / "straight", build)
    resumed = stopped_and_resumed(LOADERS["own"], folder / "stopped", 4, build)
    assert_same(state(expected), state(resumed))


class Margin(nn.Module):
    """A loss with a parameter of its own, which the optimizer trains beside the model's."""

    def __init__(self, value):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(value))

    def forward(self, output, target):
        return nn.functional.cross_entropy(output * self.scale, target)


def test_f13_parameters_of_the_loss_are_part_of_the_checkpoint(folder):
    losses = []

    def build(**options):
        loss = Margin(1.0 if len(losses) < 2 else 50.0)
        losses.append(loss)
        return make(
            mode="fp32", loss_fn=loss, optimizer=lambda p: torch.optim.AdamW([*p, loss.scale], lr=0.02),
            scheduler=None, ema_decay=None, **options,
        )  # fmt: skip

    straight(LOADERS["own"], folder / "straight", build)
    stopped_and_resumed(LOADERS["own"], folder / "stopped", 4, build)
    assert losses[0].scale.item() == losses[2].scale.item() != 1.0


class Counting(Callback):
    """Counts steps and says so in the checkpoint."""

    def __init__(self):
        self.seen = 0

    def on_step(self, trainer, facts):
        self.seen += 1

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def test_f13_callbacks_with_a_state_continue(folder):
    def build(**options):
        return make(callbacks=[Callback(), Counting()], **options)

    resumed = stopped_and_resumed(LOADERS["own"], folder, 2, build)
    assert resumed.callbacks[1].seen == resumed.steps_attempted == STEPS


def test_f13_fit_continues_where_the_same_trainer_was_stopped():
    other_process(5)
    expected = make()
    expected.fit(LOADERS["own"](), EPOCHS)
    other_process(5)
    stepwise, loader = make(), LOADERS["own"]()
    for step in range(1, 20):
        stepwise.fit(loader, EPOCHS, max_steps=step)
    assert_same(state(expected), state(stepwise))


# -- auto: the plan is part of the run --------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """The calls of the measurement, which is replaced by a plan as it would have found it."""
    calls = []

    def choose(model, run, *, pins, **others):
        calls.append(model)
        whole = Decision(layer="", old="fp32", new="fp32", reason=Reason.MEASURED_SLOWER, evidence={"bf16_ms": 1.0})
        return replace(PrecisionPlan.of("fp32", pins), decisions=(whole, replace(whole, layer="4")))

    monkeypatch.setattr(planning, "choose_plan", choose)
    return calls


def auto(**options):
    return make(mode="auto", pin={"6": "fp32"}, **options)


def test_an_automatic_plan_is_resumed_without_measuring(folder, measured):
    expected = straight(LOADERS["own"], folder / "straight", auto)
    resumed = stopped_and_resumed(LOADERS["own"], folder / "stopped", 4, auto)
    assert len(measured) == 2, "once for each trainer that started from nothing"
    assert resumed.plan.digest == expected.plan.digest
    reasons = {d.layer: (d.reason, d.evidence.get("first_reason")) for d in resumed.plan.decisions}
    assert reasons[""] == reasons["4"] == (Reason.RESUMED, "measured_slower")
    assert reasons["6"] == (Reason.RESUMED, "pinned")
    values = state(expected), state(resumed)
    assert_same({**values[0], "plan": None}, {**values[1], "plan": None})
    assert curve(folder / "stopped") == curve(folder / "straight")
    assert [a.resume_step for a in read_run(folder / "stopped").attempts] == [0, resumed_from(folder / "stopped")]


def resumed_from(path):
    """The attempted steps of the first attempt."""
    return max(line["step"] for line in read_run(path).metrics if line["attempt"] == 1)


def test_new_pins_come_before_a_resumed_plan(folder, measured, caplog):
    first = auto()
    first.fit(LOADERS["own"](), 1)
    first.save(folder)
    second = make(mode="auto", pin={"0": "fp32"})
    second.fit(LOADERS["own"](), 1, resume=folder)
    assert [rule.pattern for rule in second.plan.rules] == ["0", "6"]
    assert "which the checkpoint's plan did not have" in caplog.text


def test_a_run_may_change_its_precision_by_name_when_it_resumes(folder, caplog):
    first = make()
    first.fit(LOADERS["own"](), 1)
    first.save(folder)
    second = make(mode="bf16")
    second.fit(LOADERS["own"](), 2, resume=folder)
    assert second.plan.base.name == "bf16"
    assert second.scaler.get_scale() == 1.0
    assert "resumed with plan bf16; the checkpoint had fp16" in caplog.text
    assert "the loss scale starts anew" in caplog.text


# -- F10, F11, F12: what is loaded is what was saved, where it belongs -------------------------------------------


def trained(folder, **options):
    """A trainer with a checkpoint in `folder`."""
    other_process(5)
    trainer = make(**options)
    trainer.fit(LOADERS["own"](), 1)
    trainer.save(folder)
    return trainer


def test_f10_a_checkpoint_holds_the_moment_of_the_save(folder):
    trainer = trained(folder)
    kept = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with torch.no_grad():
        for value in [*trainer.model.parameters(), *trainer.model.buffers(), *trainer.ema.values.values()]:
            value.zero_()
    saved = read_checkpoint(next((folder / "checkpoints").iterdir())).tensors["model"]
    assert kept.keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in kept.items())


class Reordered(nn.Module):
    """Two layers of one shape, registered in either order."""

    def __init__(self, *order):
        super().__init__()
        torch.manual_seed(0)
        for name in order:
            self.add_module(name, nn.Linear(6, 6))

    def forward(self, inputs):
        return self.b(self.a(inputs))[:, :3]


def moments(trainer):
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    return {names[id(p)]: entry["exp_avg"].clone() for p, entry in trainer.optimizer.state.items()}


@pytest.mark.parametrize("change", ["model", "optimizer"])
def test_f11_optimizer_state_goes_by_name_when_the_order_changed(folder, change):
    first = trained(folder, model=Reordered("a", "b"), mode="bf16")
    model = Reordered("b", "a") if change == "model" else Reordered("a", "b")
    optimizer = adamw if change == "model" else lambda params: adamw(list(params)[::-1])
    second = make(model, "bf16", optimizer=optimizer)
    second.fit(LOADERS["own"](), 1, resume=folder)
    assert moments(first).keys() == moments(second).keys()
    assert all(torch.equal(value, moments(second)[name]) for name, value in moments(first).items())
    assert all(torch.equal(v, second.model.state_dict()[name]) for name, v in first.model.state_dict().items())
    assert not torch.equal(moments(first)["a.weight"], moments(first)["b.weight"])


def test_f11_torch_optimizers_swap_the_moments_of_two_parameters():
    a, b = (nn.Parameter(torch.ones(2)) for _ in range(2))
    first = torch.optim.AdamW([a, b])
    a.grad, b.grad = torch.full((2,), 1.0), torch.full((2,), 100.0)
    first.step()
    second = torch.optim.AdamW([b, a])
    second.load_state_dict(first.state_dict())
    assert first.state[a]["exp_avg"][0].item() == pytest.approx(0.1)
    assert second.state[a]["exp_avg"][0].item() == pytest.approx(10.0)


def test_f12_a_checkpoint_in_another_number_format_is_refused(folder):
    model = net().double()
    with torch.no_grad():
        model[0].weight.fill_(1e300)
    wide = MixedPrecisionTrainer(model, PrecisionPlan.of("fp64"), device="cpu", optimizer=adamw)
    wide.save(folder)
    with pytest.raises(CheckpointError, match=r"0\.weight .*float64, but the one here has .*float32"):
        make(mode="fp32", scheduler=None, ema_decay=None).fit(LOADERS["own"](), resume=folder)


def test_f12_torch_loads_a_value_out_of_range_as_infinity():
    layer = nn.Linear(1, 1, bias=False).half()
    layer.load_state_dict({"weight": torch.tensor([[1e6]])})
    assert math.isinf(layer.weight.item())


# -- refusals: one error, nothing changed ---------------------------------------------------------------------


def wider():
    torch.manual_seed(0)
    return nn.Sequential(*net()[:4], nn.Linear(16, 17), nn.ReLU(), nn.Linear(17, 3))


def longer():
    torch.manual_seed(0)
    return nn.Sequential(*net(), nn.Identity(), nn.Linear(3, 3))


def split(params):
    params = list(params)
    return torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}], lr=0.02)


REFUSED = {
    "shape": ({"model": wider}, r"4\.weight \(16, 16\) .*, but the one here has \(17, 16\)"),
    "names": ({"model": longer}, r"tensors \[\], but the one here has \['8\.bias', '8\.weight'\]"),
    "optimizer": ({"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}, "optimizer AdamW, but the one here has SGD"),
    "groups": ({"optimizer": split}, r"optimizer groups .*in group 0, but the one here has \['0\.bias', '0\.weight'\]"),
    "no scheduler": ({"scheduler": None}, "was written with a StepLR as its scheduler.*Resume with a StepLR"),
    "scheduler": ({"scheduler": lambda o: CosineAnnealingLR(o, 9)}, "a StepLR as its scheduler"),
    "no average": ({"ema_decay": None}, "averages 8 weights, not 0.*ema_decay"),
    "callbacks": ({"callbacks": [Callback()]}, "was written with 0 callbacks"),
    "policy": ({"loss_scale_policy": "predictive"}, "state of policy 'dynamic'.*Allowed: .*'predictive'"),
    "scale": ({"loss_scale_policy": DynamicLossScale(8.0, ceiling=8.0)}, r"scale=.*Allowed: scale is in \["),
}  # fmt: skip


def refused(trainer, folder, error, message):
    """The trainer refuses the checkpoint with one error, and it, the generators and the folder are as before."""
    before, files = copy.deepcopy(state(trainer)), sorted(folder.rglob("*"))
    scale = trainer.scaler.policy.state
    with pytest.raises(error, match=message) as caught:
        trainer.fit(LOADERS["own"](), 2, resume=folder)
    assert "Allowed: " in str(caught.value)
    assert_same(before, state(trainer))
    assert trainer.scaler.policy.state is scale
    assert sorted(folder.rglob("*")) == files


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("mode", ["fp16", "auto"])
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_changed(folder, measured, case, mode):
    options, message = REFUSED[case]
    options = {**options, "model": options["model"]() if "model" in options else net(seed=3)}
    trained(folder)
    if mode == "auto" and case in ("policy", "scale"):
        options["pin"] = {"0": "fp16"}
    error = LossScaleError if case in ("policy", "scale") else CheckpointError
    refused(make(mode=mode, run_dir=folder / "new", **options), folder, error, message)
    assert not measured


def test_a_checkpoint_with_a_scheduler_that_this_run_adds_is_refused(folder):
    trained(folder, scheduler=None)
    refused(make(), folder, CheckpointError, "was written with no scheduler.*Resume with no scheduler")


def test_a_checkpoint_with_an_average_that_this_run_adds_is_refused(folder):
    trained(folder, ema_decay=None)
    refused(make(), folder, CheckpointError, "averages 0 weights, not 8")


def test_a_checkpoint_of_a_newer_release_is_refused(folder, monkeypatch):
    monkeypatch.setattr(resume, "STATE_VERSION", 2)
    trained(folder)
    monkeypatch.undo()
    refused(make(), folder, CheckpointError, "has state version 2, not 1.*Use a matching release")


def test_a_checkpoint_of_a_loader_with_a_state_is_refused_for_one_without(folder):
    trainer = make()
    trainer.fit(Stateful(), 1)
    trainer.save(folder)
    refused(make(), folder, CheckpointError, "a loader that keeps its own position.*Pass the loader")


def test_a_plan_this_device_cannot_run_is_refused(folder, measured):
    trained(folder)
    trainer = MixedPrecisionTrainer(
        net(), "auto", device="cpu", optimizer=adamw, scheduler=halving, ema_decay=0.9,
        loss_scale_policy=DynamicLossScale(2.0**17, interval=2), gradient_accumulation_steps=3,
    )  # fmt: skip
    if "fp16" in trainer.capabilities.matmul_formats:
        pytest.skip("this CPU multiplies fp16")
    refused(trainer, folder, ConfigError, "does not multiply fp16.*emulate=True")


@pytest.mark.parametrize("path", ["", "checkpoints", "nowhere"])
def test_nothing_to_resume_from_is_an_error(folder, path):
    refused(make(), folder / path if path != "nowhere" else folder, CheckpointError, "no complete checkpoint under")


def test_a_loader_that_is_shorter_than_the_position_is_an_error(folder):
    first = make(mode="bf16")
    first.fit(LOADERS["own"](), 1, max_steps=1)
    first.save(folder)
    second = make(mode="bf16")
    with pytest.raises(ConfigError, match=r"loader that ended after 1 batches, while resuming behind batch \d"):
        second.fit(list(LOADERS["own"]())[:1], 1, resume=folder)


# -- F14: ends that nobody planned ----------------------------------------------------------------------------------


class Interrupt(Callback):
    """Raises after a number of windows, in the place where its kind of trouble would come from."""

    def __init__(self, at):
        self.at = at

    def on_gradients(self, trainer):
        if trainer.steps_attempted == self.at:
            raise KeyboardInterrupt("stop")


@pytest.mark.parametrize("at", range(1, STEPS))
def test_f14_after_an_exception_inside_a_step_the_last_boundary_is_saved_and_resumed(folder, at):
    expected = straight(LOADERS["own"], folder / "straight", lambda **o: make(callbacks=[Interrupt(99)], **o))
    other_process(5)
    first = make(callbacks=[Interrupt(at)])
    with pytest.raises(KeyboardInterrupt, match="stop"):
        first.fit(LOADERS["own"](), EPOCHS)
    assert first.steps_attempted == at
    first.save(folder / "saved")
    other_process(6)
    second = make(net(seed=3), callbacks=[Interrupt(99)])
    second.fit(LOADERS["own"](), EPOCHS, resume=folder / "saved")
    assert_same(state(expected), state(second))


def test_f14_a_checkpoint_that_lacks_a_file_is_passed_over_for_the_one_before(folder, caplog):
    expected = straight(LOADERS["own"], folder / "straight")
    other_process(5)
    first = make(run_dir=folder / "run", checkpoint_every=1)
    first.fit(LOADERS["own"](), EPOCHS, max_steps=3)
    newest = sorted((folder / "run" / "checkpoints").iterdir())[-1]
    (newest / "optimizer.safetensors").unlink()
    second = make(net(seed=3), run_dir=folder / "run")
    with pytest.raises(CheckpointError, match=r"no complete checkpoint under .*Allowed"):
        second.fit(LOADERS["own"](), EPOCHS, resume=newest)
    second.fit(LOADERS["own"](), EPOCHS, resume=folder / "run")
    assert "passed over" in caplog.text
    assert_same(state(expected), state(second))
    assert curve(folder / "run") == curve(folder / "straight")


KILLED = """
import os, signal, sys
sys.path[:0] = {path!r}
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("resume_faults", {file!r})
module = module_from_spec(spec)
spec.loader.exec_module(module)
class Killed(module.Callback):
    def on_gradients(self, trainer):
        if trainer.steps_attempted == 5:
            os.kill(os.getpid(), signal.SIGTERM)
module.other_process(5)
trainer = module.make(run_dir={run!r}, checkpoint_every=1, callbacks=[Killed()])
trainer.fit(module.LOADERS["own"](), module.EPOCHS)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_f14_a_process_ended_by_a_signal_inside_a_step_is_resumed_from_the_step_before(folder):
    script = KILLED.format(path=sys.path, file=__file__, run=str(folder / "run"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGTERM, done.stderr
    expected = straight(LOADERS["own"], folder / "straight", lambda **o: make(callbacks=[Interrupt(99)], **o))
    resumed = make(net(seed=3), run_dir=folder / "run", callbacks=[Interrupt(99)])
    resumed.fit(LOADERS["own"](), EPOCHS, resume=folder / "run")
    assert_same(state(expected), state(resumed))
    assert curve(folder / "run") == curve(folder / "straight")
    run = json.loads((folder / "run" / "run.json").read_text())
    assert [(a["outcome"], a["resume_step"]) for a in run["attempts"]] == [(None, 0), ("completed", 5)]


def test_f14_one_of_several_processes_is_refused_before_anything_happens(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = net()
    with pytest.raises(
        ConfigError, match=r"more than one process \(WORLD_SIZE=2\).*Allowed: one process on one device"
    ):
        make(model, run_dir=folder / "run")
    assert type(model[0]) is nn.Linear
    assert not (folder / "run").exists()
