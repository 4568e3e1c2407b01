"""The loss scaler under every fault we know of, beside `torch.amp.GradScaler` under the same.

The letters and numbers in the names are those of the project's list of faults, section A. Tests with
`theirs` in the name show what plain PyTorch does.
"""

from __future__ import annotations

import logging
import math
import warnings

import pytest
import torch
from torch import nn

from deepseek_mp import Callback, LossScaler, MixedPrecisionTrainer
from deepseek_mp.controller import DynamicLossScale, PredictiveLossScale
from deepseek_mp.errors import ConfigError, LossScaleError, NonFiniteError
from deepseek_mp.testing import Fault, FaultInjector, InjectedError

NAN, INF = float("nan"), float("inf")


def theirs_step(scaler, optimizer, *grads):
    """One iteration of the documented loop with these gradients; scheduler-like code comes after it."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    scaler.scale(torch.ones(()))
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    scaler.step(optimizer)
    scaler.update()


def theirs(lr=0.1, **options):
    param = nn.Parameter(torch.ones(1))
    return param, torch.optim.SGD([param], lr=lr), torch.amp.GradScaler("cpu", **options)


def ours_step(scaler, *optimizers, grads, **options):
    params = [param for o in optimizers for group in o.param_groups for param in group["params"]]
    scaler.scale(torch.ones(()))
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return scaler.step(*optimizers, **options)


def ours(policy="dynamic", lr=0.1, value=1.0):
    param = nn.Parameter(torch.tensor([value]))
    return param, torch.optim.SGD([param], lr=lr), LossScaler(policy)


def bad(batch):
    return batch[0] * NAN, batch[1]


def step_all(trainer, batches, faults=None):
    """Steps on all batches, counting for the injector; their statuses."""
    statuses = []
    for i, batch in enumerate(batches):
        if faults is not None:
            faults.step = i
        statuses.append(trainer.step(batch).status)
    return statuses


# ------------------------------------------------------------------------ A01 to A03 the scale's bounds


def test_a01_after_a_long_run_of_nan_the_scale_is_at_its_floor_and_training_goes_on(
    make_trainer, make_batches, state_of, assert_same
):
    trainer, batches = make_trainer("fp16", "dynamic", max_skipped_steps=1000), make_batches(2)
    before = state_of(trainer)
    with pytest.warns(UserWarning, match="the loss scale fell to 0.5"):
        statuses = step_all(trainer, [bad(batches[0])] * 40)
    assert statuses == ["skipped"] * 40
    assert trainer.scaler.get_scale() == 2.0**-14
    assert_same(before, state_of(trainer), but=("scaler.scale",))
    assert trainer.step(batches[1]).status == "applied"
    assert all(param.isfinite().all() for param in trainer.model.parameters())


def test_a01_too_many_skips_in_a_row_are_an_error_that_names_the_module(
    make_trainer, make_batches, state_of, assert_same
):
    trainer, batches = make_trainer("fp16", max_skipped_steps=3), make_batches(8)
    faults = FaultInjector(trainer.model)
    faults.add(Fault(kind="inf", where="activation", module="body.2", steps={1, 2, 4, 5, 6}))
    with faults, pytest.raises(NonFiniteError, match=r"3 steps in a row .* 'body\.2'") as error:
        step_all(trainer, batches, faults)
    assert (faults.step, error.value.skipped) == (6, 3)
    control = make_trainer("fp16")
    assert step_all(control, [batches[0], batches[3]]) == ["applied"] * 2
    assert_same(state_of(trainer), state_of(control))


@pytest.mark.parametrize("count", [0, torch.tensor(0)], ids=["host", "device"])
def test_a01_a_window_without_items_does_not_hide_a_run_of_skips(count, make_trainer, make_batches):
    counts, (batch, empty) = iter([6, 6, count, 6, 6]), make_batches(2)  # a bad step is computed twice
    trainer = make_trainer(
        "fp16", max_skipped_steps=2, loss_fn=lambda output, _: (output.float().square().mean(), next(counts))
    )
    trainer.step(bad(batch))
    assert trainer.step(empty).status == "no_grads"
    with pytest.raises(NonFiniteError, match="2 steps in a row"):
        trainer.step(bad(batch))


def test_a01_theirs_the_scale_reaches_zero_and_the_next_healthy_step_is_nan():
    param, optimizer, scaler = theirs()
    for _ in range(170):
        theirs_step(scaler, optimizer, torch.tensor([NAN]))
    assert scaler.get_scale() == 0.0
    theirs_step(scaler, optimizer, torch.tensor([0.0]))
    assert param.isnan().all()


def test_a02_a_scale_below_one_is_one_warning_with_advice(make_trainer, make_batches):
    trainer, (batch,) = make_trainer("fp16", DynamicLossScale(2.0)), make_batches(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            trainer.step(bad(batch))
    (warning,) = [str(w.message) for w in caught if "loss scale" in str(w.message)]
    assert "Train in bf16, or pin the module that overflows to fp32 ((batch))" in warning


def test_a02_theirs_nothing_is_said():
    _, optimizer, scaler = theirs()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(20):
            theirs_step(scaler, optimizer, torch.tensor([INF]))
    assert scaler.get_scale() == 0.0625
    assert caught == []


@pytest.mark.parametrize("gradient", [0.0, 1e-30])
@pytest.mark.parametrize("policy", [DynamicLossScale, PredictiveLossScale])
def test_a03_on_a_long_quiet_run_the_scale_stops_far_below_overflow(policy, gradient):
    _, optimizer, scaler = ours(policy(interval=1))
    for _ in range(100):
        assert ours_step(scaler, optimizer, grads=[torch.full((1,), gradient)]).status == "applied"
    assert 2.0**10 <= scaler.get_scale() <= 2.0**24
    assert scaler.scale(torch.tensor(1e3)).isfinite()


def test_a03_theirs_a_loss_of_a_thousand_is_infinite_then():
    _, optimizer, scaler = theirs(growth_interval=1)
    for _ in range(200):
        theirs_step(scaler, optimizer, torch.zeros(1))
    assert scaler.scale(torch.tensor(1e3)).isinf()


# -------------------------------------------------------------------------- A04 to A06 bad settings

WRONG = [
    {"initial": 0.0}, {"initial": -1.0}, {"initial": NAN}, {"initial": INF}, {"backoff": 0.0}, {"backoff": -0.5},
    {"growth": NAN}, {"growth": INF}, {"interval": 0}, {"interval": -3},
]  # fmt: skip


@pytest.mark.parametrize("arguments", WRONG, ids=str)
def test_a04_a_setting_that_cannot_work_is_refused_at_construction(arguments):
    ((name, value),) = arguments.items()
    with pytest.raises(LossScaleError, match=f"{name}={value!r}"):
        DynamicLossScale(**arguments)


@pytest.mark.parametrize("policy", [0.0, -1.0, NAN, INF])
def test_a04_the_trainer_refuses_such_a_scale_before_it_touches_the_model(policy, make_model):
    model = make_model()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(LossScaleError, match="initial="):
        MixedPrecisionTrainer(model, "fp16", policy, emulate=True)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.parametrize("arguments", WRONG, ids=str)
def test_a04_theirs_all_of_them_are_accepted(arguments):
    names = {"initial": "init_scale", "backoff": "backoff_factor", "growth": "growth_factor"}
    scaler = torch.amp.GradScaler("cpu", **{names.get(k, "growth_interval"): v for k, v in arguments.items()})
    scaler.scale(torch.ones(()))


@pytest.mark.parametrize("change", [{"scale": 0.0}, {"scale": NAN}, {"scale": INF}, {"scale": -5.0}, {"good_steps": -1},
                                    {"good_steps": None}, {"scale": None}], ids=str)  # fmt: skip
def test_a05_a_bad_state_is_refused_and_nothing_has_changed(change):
    scaler = LossScaler(DynamicLossScale(8.0))
    state = scaler.state_dict() | {"scale": 4.0} | change
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(LossScaleError, match=next(iter(change))):
        scaler.load_state_dict(state)
    assert scaler.state_dict() == LossScaler(DynamicLossScale(8.0)).state_dict()


def test_a05_theirs_bad_values_are_taken_and_a_failed_load_has_changed_the_scale():
    for value in (0.0, NAN, INF, -5.0):
        scaler = torch.amp.GradScaler("cpu")
        scaler.load_state_dict(scaler.state_dict() | {"scale": value})
        assert scaler.get_scale() == value or math.isnan(value)
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(KeyError, match="growth_factor"):
        scaler.load_state_dict({"scale": 4.0})
    assert scaler.get_scale() == 4.0


def test_a06_state_with_and_without_scaling_is_refused_both_ways():
    with pytest.raises(LossScaleError, match=r"state of policy 'none'.*'dynamic'"):
        LossScaler("dynamic").load_state_dict(LossScaler("none").state_dict())
    with pytest.raises(LossScaleError, match=r"state of policy 'dynamic'.*'none'"):
        LossScaler("none").load_state_dict(LossScaler("dynamic").state_dict())


@pytest.mark.parametrize(("saved", "resumed"), [("fp16", "bf16"), ("bf16", "fp16")])
def test_a06_a_run_resumed_in_another_precision_says_that_its_scale_starts_anew(
    saved, resumed, make_trainer, make_batches, tmp_path, caplog
):
    make_trainer(saved, "dynamic", run_dir=tmp_path).fit(make_batches(2))
    trainer = make_trainer(resumed, "dynamic")
    with caplog.at_level(logging.WARNING, logger="deepseek_mp"):
        trainer.fit(make_batches(2), epochs=2, resume=tmp_path)
    assert "the loss scale starts anew" in caplog.text
    assert trainer.scaler.get_scale() == (2.0**16 if resumed == "fp16" else 1.0)


def test_a06_theirs_a_disabled_scaler_drops_a_state_without_a_word():
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.load_state_dict(torch.amp.GradScaler("cpu").state_dict())
    assert scaler.state_dict() == {}


# ------------------------------------------------------------------------------- A07 no gradients


class Branches(nn.Module):
    """A model of which a batch may use either half."""

    def __init__(self):
        super().__init__()
        self.even, self.odd = nn.Linear(4, 3), nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x, odd=False):
        return (self.odd if odd else self.even)(self.norm(x).detach())


def test_a07_no_gradients_is_a_result_and_moves_nothing(make_trainer, make_batches, state_of, assert_same):
    model, ((x, y), _) = Branches(), make_batches(2)
    optimizer = torch.optim.AdamW(model.even.parameters(), fused=True)
    trainer = make_trainer("fp16", DynamicLossScale(interval=3), model=model, optimizer=optimizer)
    used, unused = ({"x": x, "odd": False}, y), ({"x": x, "odd": True}, y)
    trainer.step(used)
    before = state_of(trainer)
    facts = trainer.step(unused).facts
    assert (facts.status, facts.reason) == ("no_grads", "no parameter of the optimizer received a gradient")
    assert_same(before, state_of(trainer))
    assert trainer.step(used).status == "applied"


@pytest.mark.parametrize("fused", [False, True])
def test_a07_theirs_it_is_an_assertion(fused):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(2))], fused=fused)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    if fused:
        scaler.step(optimizer)  # left to the kernel, so it comes out later
    with pytest.raises(AssertionError, match="No inf checks were recorded"):
        scaler.update() if fused else scaler.step(optimizer)


# ------------------------------------------------------------------- A09 and A10 order and exceptions


class RaisesOnce(Callback):
    def __init__(self, error):
        self.error = error

    def on_gradients(self, trainer):
        if trainer.steps_attempted == 1 and self.error is not None:
            error, self.error = self.error, None
            raise error


@pytest.mark.parametrize("where", ["activation", "gradient", "optimizer", "hook", "interrupt"])
@pytest.mark.parametrize("mode", ["bf16", "fp16"])
def test_a09_after_an_exception_anywhere_in_a_step_the_run_ends_as_if_it_had_not_been(
    mode, where, make_trainer, make_batches, state_of, assert_same
):
    errors = {"hook": RuntimeError("hook"), "interrupt": KeyboardInterrupt("interrupt")}
    batches, ends, attempts = make_batches(3), [], []
    for broken in (True, False):
        callback = RaisesOnce(errors.get(where) if broken else None)
        trainer = make_trainer(mode, "dynamic", callbacks=[callback])
        faults = FaultInjector(trainer.model, trainer.optimizer)
        if broken and where not in errors:
            faults.add(Fault(kind="raise", where=where, steps={1}))
        with faults:
            trainer.step(batches[0])
            faults.step = 1
            if broken:
                expected = type(errors.get(where, InjectedError()))
                with pytest.raises(expected, match=where):
                    trainer.step(batches[1])
                assert all(param.grad is None for param in trainer.model.parameters())
        for batch in batches[1:]:
            assert trainer.step(batch).status == "applied"
        ends.append(state_of(trainer))
        attempts.append(trainer.steps_attempted)
    assert attempts == [3, 3]
    assert_same(*ends)


def test_a09_theirs_after_one_exception_every_further_step_fails():
    _, optimizer, scaler = theirs()
    handle = optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("out")))
    with pytest.raises(MemoryError, match="out"):
        theirs_step(scaler, optimizer, torch.ones(1))
    handle.remove()
    scaler.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match=r"unscale_\(\) has already been called"):
        scaler.unscale_(optimizer)


def test_a10_calls_out_of_order_are_errors_that_say_what_to_do():
    _, optimizer, scaler = ours()
    advice = r"Call backward on scaler.scale\(loss\), and step once per window with all optimizers in one call"
    with pytest.raises(LossScaleError, match=advice):  # step before scale
        scaler.step(optimizer)
    ours_step(scaler, optimizer, grads=[torch.ones(1)])
    with pytest.raises(LossScaleError, match=advice):  # a second step
        scaler.step(optimizer)
    assert not hasattr(scaler, "unscale_")  # nor can one be forgotten, doubled or late
    assert not hasattr(scaler, "update")


# ---------------------------------------------------------------------- A11 to A13 which optimizers


def test_a11_closures_are_refused_in_both_spellings_and_nothing_has_changed():
    param, optimizer, scaler = ours(1024.0)
    param.grad = torch.full((1,), 2048.0)
    scaler.scale(torch.ones(()))
    with pytest.raises(ConfigError, match="Closures are not supported"):
        scaler.step(optimizer, lambda: torch.ones(()))
    with pytest.raises(TypeError, match="closure"):
        scaler.step(optimizer, closure=lambda: torch.ones(()))
    assert param.item() == 1.0


def test_a11_the_trainer_refuses_an_optimizer_that_needs_one(make_model):
    model = make_model()
    with pytest.raises(ConfigError, match="LBFGS, whose step needs a closure"):
        MixedPrecisionTrainer(model, "fp32", optimizer=torch.optim.LBFGS)
    assert type(model.head) is nn.Linear


def test_a11_theirs_a_positional_closure_applies_scaled_gradients():
    param, optimizer, scaler = theirs(init_scale=1024.0)

    def closure():
        optimizer.zero_grad()
        loss = (param * param).sum()
        scaler.scale(loss).backward()
        return loss

    closure()
    scaler.step(optimizer, closure)
    assert param.item() == pytest.approx(1.0 - 0.1 * 2.0 * 1024.0)  # 0.8 is right


def pair():
    params = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    return params, [torch.optim.SGD([param], lr=0.1) for param in params]


def test_a12_two_optimizers_in_one_step_are_one_group():
    (a, b), optimizers = pair()
    scaler = LossScaler(DynamicLossScale(4.0))
    assert ours_step(scaler, *optimizers, grads=[torch.tensor([INF]), torch.tensor([4.0])]).status == "skipped"
    assert (a.item(), b.item(), scaler.get_scale()) == (1.0, 1.0, 2.0)
    assert ours_step(scaler, *optimizers, grads=[torch.tensor([2.0]) for _ in range(2)]).status == "applied"
    assert (a.item(), b.item()) == (pytest.approx(0.9), pytest.approx(0.9))


def test_a12_theirs_one_is_applied_and_one_is_not():
    (a, b), optimizers = pair()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    a.grad, b.grad = torch.tensor([INF]), torch.tensor([4.0])
    for optimizer in optimizers:
        scaler.step(optimizer)
    assert (a.item(), b.item()) == (1.0, pytest.approx(0.9))


@pytest.mark.parametrize("late", [False, True], ids=["host", "device"])
def test_a13_fused_optimizer_skip_is_reported(late, make_trainer, make_batches, request):
    if late:
        request.getfixturevalue("late_verdict")
    trainer = make_trainer("fp16", optimizer=lambda params: torch.optim.AdamW(params, lr=0.01, fused=True))
    batches = make_batches(3)
    results = [trainer.step(bad(batch) if i == 1 else batch) for i, batch in enumerate(batches)]
    assert [result.status for result in results] == ["applied", "skipped", "applied"]
    assert [float(entry["step"]) for entry in trainer.optimizer.state.values()] == [2.0] * 6
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.9**2)


def test_a13_the_first_step_of_each_optimizer_is_not_left_to_a_fused_kernel():
    """It would skip with the optimizer's state made but never set."""
    param, _, scaler = ours()
    first, second = (torch.optim.SGD([param], lr=0.1, momentum=0.9, fused=True) for _ in range(2))
    assert scaler._is_first([first], {id(param)})
    ours_step(scaler, first, grads=[torch.tensor([INF])])  # skipped: there is still no state
    assert scaler._is_first([first], {id(param)})
    ours_step(scaler, first, grads=[torch.ones(1)])
    assert not scaler._is_first([first], {id(param)})
    assert scaler._is_first([second], {id(param)})  # of the same parameter
    assert scaler._is_first([first], {id(param), 0})  # a parameter that had no gradient so far


def test_a13_theirs_a_fused_skip_looks_like_a_step():
    param, calls = nn.Parameter(torch.ones(1)), []
    optimizer, scaler = torch.optim.AdamW([param], lr=0.1, fused=True), torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer.register_step_post_hook(lambda *_: calls.append("stepped"))
    theirs_step(scaler, optimizer, torch.tensor([INF]))
    assert param.item() == 1.0
    assert calls == ["stepped"]  # the only sign there is, and it is wrong


# ---------------------------------------------------- A14 to A16 what counts, and when the scale moves


class Counts(Callback):
    def __init__(self):
        self.statuses = []

    def on_step(self, trainer, facts):
        self.statuses.append((facts.status, trainer.steps_attempted, trainer.steps_applied))


@pytest.mark.parametrize("late", [False, True], ids=["host", "device"])
def test_a14_a15_schedule_average_and_counters_follow_applied_steps(late, make_trainer, make_batches, request):
    if late:
        request.getfixturevalue("late_verdict")
    counts, batches = Counts(), make_batches(8)
    trainer = make_trainer(
        "fp16", callbacks=[counts], optimizer=lambda params: torch.optim.AdamW(params, lr=1.0, fused=True)
    )
    result = trainer.fit([bad(b) if i in (1, 2) else b for i, b in enumerate(batches)], max_steps=4)
    assert (result.steps_attempted, result.steps_applied) == (6, 4)  # max_steps counts applied ones
    assert [status for status, _, _ in counts.statuses] == ["applied", "skipped", "skipped"] + ["applied"] * 3
    assert [applied for _, _, applied in counts.statuses] == [1, 1, 1, 2, 3, 4]
    assert trainer.scheduler.last_epoch == 4
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.9**4)


def test_a14_theirs_the_documented_loop_advances_the_schedule_on_skipped_steps():
    _, optimizer, scaler = theirs(lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    theirs_step(scaler, optimizer, torch.ones(1))
    scheduler.step()
    for _ in range(2):
        theirs_step(scaler, optimizer, torch.tensor([INF]))
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.125  # one step was applied


def test_a16_the_scale_of_a_window_is_one(make_trainer, make_batches):
    trainer = make_trainer("fp16", DynamicLossScale(64.0, interval=1), gradient_accumulation_steps=3)
    results = [trainer.step(batch) for batch in make_batches(9)]
    assert [result.scale for result in results] == [64.0] * 3 + [128.0] * 3 + [256.0] * 3


def test_a16_gradients_of_a_window_are_unscaled_by_the_scale_they_have():
    param, optimizer, scaler = ours(DynamicLossScale(4.0, interval=1), lr=1.0, value=0.0)
    for expected in (-2.0, -4.0):  # the scale doubles in between
        for _ in range(2):
            scaler.scale(param.sum()).backward()
        scaler.step(optimizer)
        optimizer.zero_grad()
        assert param.item() == expected


def test_a16_theirs_an_update_inside_a_window_mixes_two_scales():
    param, optimizer, scaler = theirs(lr=1.0, init_scale=4.0, growth_interval=1)
    param.data.zero_()
    other, other_optimizer, _ = theirs()
    scaler.scale(param.sum()).backward()
    other.grad = torch.ones(1)
    scaler.step(other_optimizer)
    scaler.update()
    scaler.scale(param.sum()).backward()
    scaler.step(optimizer)
    assert param.item() == -1.5  # -2 is right
