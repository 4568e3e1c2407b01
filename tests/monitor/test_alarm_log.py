"""From copies of the store to alarms, and none in runs that are healthy."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import nn

from deepseek_mp import MixedPrecisionTrainer
from deepseek_mp.monitor import Limits, PrecisionMonitor, Sampling
from deepseek_mp.monitor.alarm_log import KEPT, AlarmLog, Sampled
from deepseek_mp.monitor.observed import Observed
from deepseek_mp.monitor.store import SEEN, UPDATE, WIDTH
from deepseek_mp.monitor.updates import UPDATE_FIELDS
from deepseek_mp.nn import apply
from deepseek_mp.ops.statistics import ERROR_FIELDS
from deepseek_mp.optim import AdamW, set_storage
from deepseek_mp.precision import RECIPES, PrecisionPlan
from deepseek_mp.workloads.demo import tasks


class Run:
    """A store that samples are put into, and the alarms they raise."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.seen = Observed.of(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), Sampling(formats=()))
        self.log = AlarmLog(limits or Limits())
        self.step = 0

    def after(self, *units: int) -> bool:
        """The step is over; whether it met non-finite values."""
        self.step += 1
        self.seen.copies.start(Sampled(self.step, units or (0, 1), whole=False))
        sampled = self.seen.copies.next()
        assert isinstance(sampled, Sampled)
        return self.log.take_in(self.seen, sampled)

    def sample(self, unit: int, *, mass: float) -> None:
        self.seen.ran_in(self.seen.subjects[unit], RECIPES["fp16"])
        block = torch.zeros(2, WIDTH)
        block[1, ERROR_FIELDS.index("mass")] = mass
        self.seen.store.add(unit, 0, block)

    def produced(self, place: int, phase: int) -> None:
        parts = self.seen.store.parts
        parts.bad[place, SEEN.index("output")] += 5
        parts.origin[1] = torch.tensor([self.step + 1, place, phase])


def test_samples_in_a_row_raise_one_alarm_and_say_it_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="deepseek_mp")
    run = Run()
    for mass in (0.1, 0.1, 0.1, 0.1, 0.0, 0.1, 0.1, 0.1):
        run.sample(1, mass=mass)
        assert run.after() is False
    assert [(alarm.step, alarm.layer, alarm.kind) for alarm in run.log.alarms] == [
        (3, "1", "mass"), (8, "1", "mass"),
    ]  # fmt: skip
    assert run.log.raised == 2
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("1, input: mass 0.1, limit 0.005 (step 3)")


def test_a_step_without_a_new_sample_of_a_layer_does_not_count() -> None:
    run = Run()
    run.sample(0, mass=0.1)
    for _ in range(5):
        run.after()
    assert not run.log.alarms


def test_the_producer_of_a_forward_is_named_at_once() -> None:
    run = Run()
    run.produced(2, 0)
    assert run.after() is True
    alarm = run.log.alarms[0]
    assert (alarm.step, alarm.layer, alarm.tensor, alarm.kind, alarm.value) == (1, "1", "output", "non_finite", 5)
    assert run.after() is False  # the same numbers again are no news
    assert len(run.log.alarms) == 1


def test_the_producer_of_a_backward_is_named_if_it_is_more_than_a_scale_being_found() -> None:
    run = Run()
    for bad in (True, True, False, True, True, True, True):
        if bad:
            run.produced(1, 1)
        run.after()
    assert [(alarm.step, alarm.layer, alarm.tensor) for alarm in run.log.alarms] == [(6, "0", "grad_input")]


def test_a_step_whose_update_comes_late_is_told_of_once() -> None:
    run = Run()
    run.produced(2, 0)
    run.after()
    block = torch.zeros(1, WIDTH)
    run.seen.store.add(0, UPDATE, block)
    run.step -= 1
    run.after()
    assert len(run.log.alarms) == 1


def test_non_finite_values_can_be_let_pass() -> None:
    run = Run(Limits(non_finite=False))
    run.produced(2, 0)
    assert run.after() is True
    assert not run.log.alarms


def test_an_update_raises_alarms_too() -> None:
    run = Run(Limits(warmup=0))
    for _ in range(2):
        block = torch.zeros(1, WIDTH)
        block[0, UPDATE_FIELDS.index("spike")] = 6
        run.seen.store.add(0, UPDATE, block)
        run.after()
    assert [(alarm.tensor, alarm.kind, alarm.value) for alarm in run.log.alarms] == [("update", "spike", 6)]


def test_alarms_are_forgotten_but_counted() -> None:
    run = Run(Limits(in_a_row=1))
    for _ in range(KEPT + 10):
        for mass in (0.1, 0.0):
            run.sample(0, mass=mass)
            run.after()
    assert len(run.log.alarms) == KEPT
    assert run.log.raised == KEPT + 10
    assert [alarm.step for alarm in run.log.since(KEPT + 8)] == [run.step - 3, run.step - 1]
    assert len(run.log.since(0)) == KEPT
    assert run.log.since(run.log.raised) == ()


def regression() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    x = torch.randn(16 * 32, 16)
    y = torch.sin(x[:, :4]) + 0.1 * torch.randn(16 * 32, 4)
    model = nn.Sequential(
        nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 4)
    )
    return model, list(zip(x.split(32), y.split(32), strict=True))


def healthy(name: str, mode: str, steps: int) -> MixedPrecisionTrainer:
    """A run without anything wrong, every fourth step of which is sampled."""
    options = {"device": "cpu", "seed": 0, "progress": False, "emulate": True, "statistics_every": 4}
    if name == "regression":
        model, data = regression()
        trainer = MixedPrecisionTrainer(model, mode, **options)
    else:
        task = tasks(quick=True, seed=0)[name]
        data = task.data().train
        trainer = MixedPrecisionTrainer(task.model(), mode, loss_fn=task.loss_fn, **options)
    trainer.fit(data, epochs=math.ceil(steps / len(data)), max_steps=steps)
    return trainer


@pytest.mark.parametrize(
    ("name", "mode", "steps"),
    [
        ("regression", "fp16", 300),
        ("digits", "bf16", 300),
        ("text", "row", 300),
        *(
            pytest.param(name, mode, 2000, marks=pytest.mark.stress)
            for name, mode in (("regression", "row"), ("digits", "fp16"), ("text", "row"), ("text", "bf16"))
        ),
    ],
)
def test_a_healthy_run_raises_no_alarm(name: str, mode: str, steps: int) -> None:
    trainer = healthy(name, mode, steps)
    sampled = trainer.monitor.statistics()
    assert not trainer.monitor.alarms, [str(alarm) for alarm in trainer.monitor.alarms]
    assert trainer.steps_applied == steps
    assert min(layer.updates for layer in sampled.values()) > 10
    assert all({"weight", "grad_output"} <= set(layer.tensors) for layer in sampled.values())


@pytest.mark.parametrize("storage", ["bf16_sr", "bf16_kahan", None])
def test_updates_are_lost_only_where_weights_are_rounded_to_the_nearest(storage: str | None) -> None:
    """Steps far below those of BF16; most leave the weight as it is, in every storage."""
    torch.manual_seed(0)
    model, data = regression()
    if storage is None:
        model[3].bfloat16().register_forward_pre_hook(lambda _, args: args[0].bfloat16())
        model[3].register_forward_hook(lambda _, __, output: output.float())
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    else:
        optimizer = AdamW(model.parameters(), lr=1e-5)
        set_storage(optimizer, model[3].weight, storage)
    with PrecisionMonitor(model, optimizer, sample_every=None, sampling=Sampling(every=1, units=3)) as monitor:
        for x, y in data[:8]:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=storage is not None):
                loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
        assert monitor.statistics()["3"].update["lost"].last > 0.5
    found = {(alarm.layer, alarm.kind) for alarm in monitor.alarms}
    assert (("3", "lost") in found) is (storage is None)


def test_gradients_too_small_for_fp16_raise_alarms_and_a_loss_scale_ends_them() -> None:
    found = {}
    for scale in (1e-5, 1e3):
        torch.manual_seed(0)
        model, data = regression()
        apply(model, PrecisionPlan.of("fp32", {"*": "fp16"}), emulate=True)  # gradients reach layers in fp32
        with PrecisionMonitor(model, sample_every=None, sampling=Sampling(every=1, units=3)) as monitor:
            for x, y in data[:6]:
                ((model(x) - y).square().mean() * scale).backward()
            monitor.statistics()
        found[scale] = {(alarm.tensor, alarm.kind) for alarm in monitor.alarms}
    assert ("grad_output", "by_row") in found[1e-5]
    assert found[1e3] == set()
