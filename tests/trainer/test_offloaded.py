"""A trainer whose optimizer is on the host: its numbers are those of the same AdamW beside the model, to the bit."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from fake_device import FakeLanes, LateWorker
from small_runs import accuracy, batches, make, net, same_models
from torch import nn
from torch.optim.lr_scheduler import StepLR

from deepseek_mp import Callback, find_batch_size
from deepseek_mp.controller.settings import AdaptiveSettings
from deepseek_mp.errors import ConfigError
from deepseek_mp.optim.offload import OffloadedOptimizer, OffloadSettings, arena, rule
from deepseek_mp.optim.offload.stepped import stepped
from deepseek_mp.optim.offload.worker import ThreadWorker
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.trainer import offloaded, state
from deepseek_mp.trainer.adaptive import AdaptivePrecision
from deepseek_mp.trainer.recording import describe

EXACT = ("sync", "speculative")


def host(worker=ThreadWorker, rate=0.01, **settings):
    """Several chunks, on a fake device whose copies are late."""

    def make_optimizer(params):
        lanes = FakeLanes()
        chosen = OffloadSettings(**{"chunk_bytes": 100, "delay_from": 2, **settings})
        return OffloadedOptimizer(params, lr=rate, settings=chosen, lanes=lambda _: lanes, worker=worker)

    return make_optimizer


def adamw(params):
    return torch.optim.AdamW(params, lr=0.01, fused=True)


def pair(mode="fp32", *, settings=None, **options):
    """The same run without and with offloading."""
    first = make(mode, optimizer=adamw, seed=3, **options)
    return first, make(mode, optimizer=host(**(settings or {})), seed=3, **options)


def each(*trainers):
    """Each with the same random numbers, for dropout."""
    for trainer in trainers:
        torch.manual_seed(1)
        yield trainer


def weights(trainer):
    offloaded.synchronize(trainer.optimizer)
    return [p.detach().clone() for p in trainer.model.parameters()]


def equal(one, other):
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


# -- numbers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "worker"), [("sync", ThreadWorker), ("speculative", LateWorker), ("speculative", ThreadWorker)]
)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_fit_is_the_same_to_the_bit(precision, mode, worker):
    """With a window of three, whose divisor is no power of two, clipping, a schedule and an average."""
    options = {
        "gradient_accumulation_steps": 3,
        "max_grad_norm": 0.5,
        "scheduler": lambda optimizer: StepLR(optimizer, 2, 0.5),
        "ema_decay": 0.9,
    }
    one, two = pair(precision, settings={"mode": mode, "worker": worker}, **options)
    for trainer in each(one, two):
        trainer.fit(batches(5), epochs=3, val_loader=batches(2), metrics={"accuracy": accuracy})
    assert two.optimizer.split.fraction == 1.0
    assert len(two.optimizer.split.host) > 2
    assert equal(one, two)
    assert same_models(one, two)
    assert all(torch.equal(value, two.ema.values[name]) for name, value in one.ema.values.items())
    assert [e["loss"] for e in one.history] == [e["loss"] for e in two.history]
    assert one.steps_applied == two.steps_applied == 6
    assert one.optimizer.param_groups[0]["lr"] == two.optimizer.param_groups[0]["lr"] < 0.01


def test_the_settings_of_the_trainer_are_in_force():
    trainer = make(optimizer=host(), gradient_accumulation_steps=4)
    assert trainer.optimizer.settings.accumulation == 4
    assert not trainer.optimizer.settings.check_finite


@pytest.mark.parametrize("mode", EXACT)
def test_clipping_reaches_the_masters(mode):
    free, clipped = (make(optimizer=host(mode=mode), max_grad_norm=norm, seed=0) for norm in (None, 1e-3))
    reference = make(optimizer=adamw, max_grad_norm=1e-3, seed=0)
    for trainer in each(free, clipped, reference):
        for batch in batches(3):
            facts = trainer.step(batch)
    assert facts.grad_norm > 1e-3
    assert equal(clipped, reference)
    assert not equal(clipped, free)


@pytest.mark.parametrize("mode", [*EXACT, "delayed"])
def test_a_skipped_step_changes_nothing_and_is_explained(mode):
    trainer = make("fp16", optimizer=host(mode=mode), loss_scale_policy="dynamic", seed=0)
    for batch in batches(3):
        trainer.step(batch)
    before, scale = weights(trainer), trainer.scaler.get_scale()
    found = trainer.step(batches(1, bad=(0,))[0])
    assert found.status == "skipped"
    assert found.first_bad_module == "(batch)"
    assert trainer.scaler.get_scale() < scale
    assert all(torch.equal(a, b) for a, b in zip(before, weights(trainer), strict=True))
    assert all(p.grad is None for p in (*trainer.model.parameters(), *_masters(trainer)))


class BadGradient(nn.Module):
    """Makes the gradient of its weight infinite when it is told to."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.bad = False

    def forward(self, x):
        y = x * self.weight
        if self.bad:
            y.register_hook(lambda grad: grad * math.inf)
        return y


def test_the_module_of_a_bad_gradient_is_named_and_leaves_none_behind():
    model = nn.Sequential(BadGradient(), nn.Linear(4, 3))
    one, two = make(model=copy.deepcopy(model), optimizer=adamw), make(model=model, optimizer=host())
    for trainer in each(one, two):
        trainer.model[0].bad = True
        trainer.bad = trainer.step(batches(1)[0])
        trainer.model[0].bad = False
        trainer.step(batches(2)[1])
    assert two.bad.status == "skipped"
    assert two.bad.first_bad_module == one.bad.first_bad_module == "1"
    assert equal(one, two)


def test_a_micro_batch_that_fails_leaves_no_gradient():
    """Half of a window had arrived."""
    one, two = pair(gradient_accumulation_steps=2)
    for trainer in each(one, two):
        trainer.step(batches(1)[0])
        with pytest.raises(RuntimeError, match="mat1 and mat2"):
            trainer.step((torch.ones(4, 7), torch.zeros(4, dtype=torch.long)))
        for batch in batches(4):
            trainer.step(batch)
    assert equal(one, two)


def test_a_host_step_that_fails_is_taken_back(monkeypatch):
    one, two = pair()
    for trainer in each(one, two):
        trainer.step(batches(1)[0])
    before = weights(two)
    real, calls = rule.step, iter(range(100))

    def fails(*given):
        real(*given)
        if next(calls) == 1:
            raise RuntimeError("the host's step failed")

    monkeypatch.setattr(rule, "step", fails)
    with pytest.raises(RuntimeError, match="the host's step failed") as raised:
        two.step(batches(2)[1])
    monkeypatch.setattr(rule, "step", real)
    assert not getattr(raised.value, "__notes__", [])
    assert all(torch.equal(a, b) for a, b in zip(before, weights(two), strict=True))
    for trainer in each(one, two):
        trainer.step(batches(3)[2])
    assert equal(one, two)


class Halve(Callback):
    """Changes gradients before they are clipped and applied."""

    def on_gradients(self, trainer):
        for parameter in trainer.model.parameters():
            stepped(trainer.optimizer, parameter).grad.mul_(0.5)


@pytest.mark.parametrize("mode", EXACT)
def test_a_callback_finds_unscaled_gradients_at_the_masters(mode):
    options = {"callbacks": [Halve()], "gradient_accumulation_steps": 3, "max_grad_norm": 0.3}
    one, two = pair("fp16", settings={"mode": mode}, **options)
    for trainer in each(one, two):
        for batch in batches(5):
            trainer.step(batch)
    assert equal(one, two)


@pytest.mark.parametrize("mode", EXACT)
def test_a_short_window_at_the_end_of_an_epoch(mode):
    one, two = pair(settings={"mode": mode, "worker": LateWorker}, gradient_accumulation_steps=4, max_grad_norm=0.1)
    for trainer in each(one, two):
        trainer.fit(batches(5), epochs=2)
    assert one.steps_applied == two.steps_applied == 4
    assert equal(one, two)


def test_part_of_it_on_the_device():
    one, two = pair(settings={"free_bytes": 300}, gradient_accumulation_steps=2, max_grad_norm=0.1)
    assert 0 < two.optimizer.split.fraction < 1
    for trainer in each(one, two):
        trainer.fit(batches(4), epochs=2)
    # The device's part is stepped by `foreach`, whose last bits differ from the fused kernel's.
    for mine, theirs in zip(weights(two), weights(one), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_delayed_applies_every_step_and_saves_the_last_one(tmp_path):
    trainer = make(optimizer=host(mode="delayed"), seed=0, run_dir=tmp_path)
    trainer.fit(batches(5), epochs=2)
    states = trainer.optimizer.state_dict()["state"]
    assert {int(state["step"]) for state in states.values()} == {10}
    again = make(optimizer=host(mode="delayed"), seed=0)
    again.load(tmp_path)
    assert equal(trainer, again)


@pytest.mark.parametrize("mode", EXACT)
def test_bf16_weights_have_their_masters_saved(mode, tmp_path):
    def run(trainer, steps):
        for batch in batches(5)[:steps]:
            trainer.step(batch)

    def fresh():
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16()
        return make("bf16", model=model, optimizer=host(mode=mode)(model.parameters()), seed=0)

    torch.manual_seed(0)
    whole = fresh()
    run(whole, 3)
    whole.save(tmp_path)
    torch.manual_seed(1)
    half = fresh()
    half.load(tmp_path)
    masters = [[master.detach().clone() for master in _masters(trainer)] for trainer in (whole, half)]
    assert all(map(torch.equal, *masters))
    assert any((master != master.bfloat16()).any() for master in masters[0])
    run(whole, 5)
    run(half, 5)
    assert equal(whole, half)
    assert all(torch.equal(a, b) for a, b in zip(_masters(whole), _masters(half), strict=True))


def _masters(trainer):
    return [trainer.optimizer.master(p) for p in trainer.model.parameters()]


# -- checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", EXACT)
@pytest.mark.parametrize("micro_steps", [3, 4])
def test_a_resumed_run_is_the_run(mode, micro_steps, tmp_path):
    """Saved in an open window (3), and just after a step whose weights are on their way (4)."""

    def fresh():
        options = {"gradient_accumulation_steps": 2, "scheduler": lambda o: StepLR(o, 2, 0.5), "ema_decay": 0.9}
        return make("bf16", optimizer=host(mode=mode), seed=0, **options)

    whole = fresh()
    for batch in batches(5)[:micro_steps]:
        whole.step(batch)
    whole.save(tmp_path)
    other = fresh()
    with torch.no_grad():
        for p in other.model.parameters():
            p.add_(1.0)
    other.load(tmp_path)
    assert equal(whole, other)
    for trainer in each(whole, other):
        for batch in batches(5)[micro_steps - 5 :]:
            trainer.step(batch)
        trainer.settle()
    assert equal(whole, other)
    assert all(torch.equal(value, other.ema.values[name]) for name, value in whole.ema.values.items())


@pytest.mark.parametrize(("saves", "resumes"), [(adamw, host()), (host(), adamw)])
def test_a_run_may_begin_and_end_offloading(saves, resumes, tmp_path):
    first = make(optimizer=saves, seed=0)
    for batch in batches(3):
        first.step(batch)
    first.save(tmp_path)
    second = make(optimizer=resumes, seed=1)
    second.load(tmp_path)
    for trainer in each(first, second):
        for batch in batches(5):
            trainer.step(batch)
    assert equal(first, second)


def test_state_is_kept_by_the_names_of_the_models_parameters(tmp_path):
    trainer = make(optimizer=host(), seed=0)
    trainer.step(batches(1)[0])
    tensors, values = offloaded_state(trainer)
    names = [name for name, _ in trainer.model.named_parameters()]
    assert {place.split("/")[0] for place in tensors} == set(names)
    assert values["groups"][0]["params"] == names
    assert values["type"] == "AdamW"


def offloaded_state(trainer):
    assert not state.outside_parameters(trainer.model, trainer.optimizer)
    return state.optimizer_state(trainer.model, trainer.optimizer)


def test_the_models_own_state_waits_for_what_is_outstanding():
    trainer = make(optimizer=host(mode="delayed", delay_from=0), seed=0)
    for batch in batches(3):
        trainer.step(batch)
    saved = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    states = trainer.optimizer.state
    masters = dict(zip(dict(trainer.model.named_parameters()), _masters(trainer), strict=True))
    assert all(torch.equal(saved[name], master) for name, master in masters.items())
    assert {int(state["step"]) for state in states.values()} == {3}
    copy.deepcopy(trainer.model).state_dict()


# -- what else reads weights -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", EXACT)
def test_evaluation_sees_the_weights_of_the_last_step(mode):
    one, two = pair(settings={"mode": mode}, ema_decay=0.5)
    for batch in batches(3):
        for trainer in each(one, two):
            trainer.step(batch)
        assert one.evaluate(batches(2)) == two.evaluate(batches(2))
        assert torch.equal(one.predict(batch), two.predict(batch))
    assert equal(one, two)


def test_the_average_waits_for_weights_that_forward_would_wait_for():
    model, lanes = net(), FakeLanes()
    settings = OffloadSettings(chunk_bytes=100)
    optimizer = OffloadedOptimizer(model.parameters(), lr=0.01, model=model, settings=settings, lanes=lambda _: lanes)
    one, two = (make(optimizer=o, model=m, ema_decay=0.5) for o, m in ((adamw, None), (optimizer, model)))
    for trainer in each(one, two):
        for batch in batches(3):
            trainer.step(batch)
    assert all(torch.equal(value, two.ema.values[name]) for name, value in one.ema.values.items())


def test_another_plan_between_steps():
    one, two = pair("bf16")
    for trainer in each(one, two):
        for number, batch in enumerate(batches(4)):
            if number == 2:
                trainer.change_plan("fp32")
            trainer.step(batch)
    assert equal(one, two)


def test_a_plan_that_moves_convolutions_to_channels_last():
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3))

    images = torch.randn(4, 3, 4, 4)
    made = [make(model=model(), optimizer=optimizer) for optimizer in (adamw, host())]
    for trainer in each(*made):
        for number in range(4):
            if number == 2:
                trainer.change_plan(replace(PrecisionPlan.of("fp32"), memory_format="channels_last"))
            trainer.step((images, torch.tensor([0, 1, 2, 0])))
    assert made[1].model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert equal(*made)


@pytest.mark.parametrize("mode", [*EXACT, "delayed"])
def test_find_batch_size_leaves_no_trace(mode):
    one, two = (make("bf16", optimizer=host(mode=mode, delay_from=0), seed=0) for _ in range(2))

    def batch(size):
        return torch.ones(size, 4), torch.zeros(size, dtype=torch.long)

    for number, data in enumerate(batches(4)):
        if number in (0, 2):
            sent = len(two.optimizer._lanes.events)
            assert find_batch_size(two, batch, limit=8).size == 8
            assert any(event.startswith("up") for event in two.optimizer._lanes.events[sent:])  # it made whole steps
            offloaded.synchronize(one.optimizer)  # as the search does, which in 'delayed' is part of the numbers
        for trainer in each(one, two):
            torch.manual_seed(number)
            trainer.step(data)
    assert equal(one, two)


def test_auto_measures_without_the_masters():
    trainer = make("auto", optimizer=host(), seed=0, adapt=False)
    trainer.step(batches(1)[0])
    assert trainer.steps_applied == 1
    assert {int(state["step"]) for state in trainer.optimizer.state.values()} == {1}


@pytest.mark.parametrize("mode", EXACT)
def test_update_statistics_are_those_of_the_masters(mode):
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    made = [
        make("bf16", model=copy.deepcopy(model), optimizer=optimizer, statistics_every=1)
        for optimizer in (adamw, host(mode=mode))
    ]
    for trainer in each(*made):
        for seed in range(3):
            torch.manual_seed(seed)
            trainer.step((torch.randn(8, 16), torch.randn(8, 16)))
        trainer.settle()
    one, two = (_updates(trainer) for trainer in made)
    assert one
    assert one == two
    assert equal(*made)


def _updates(trainer):
    report = trainer.monitor.statistics()
    return {name: str(layer.update) for name, layer in report.items() if layer.update is not None}


def test_gradients_leave_while_backward_runs_and_not_all_at_its_end(monkeypatch):
    """One operation that casts all weights, as on accelerators, would make all of their gradients at the end."""
    monkeypatch.setattr("deepseek_mp.trainer.step.SLOWER_IN_ONE_PASS", ())
    one, two = pair("bf16")
    assert one._stepper._casts is not None
    assert two._stepper._casts is None
    events = two.optimizer._lanes.events
    two.model[1].register_full_backward_hook(lambda *_: events.append("second layer done"))
    two.step(batches(1)[0])
    assert events.index("down 0") < events.index("second layer done")


def test_live_precision_sees_the_gradients_of_the_masters(tmp_path):
    def run(optimizer):
        settings = AdaptiveSettings(
            warm_up=4, probe_every=2, decide_every=4, recipes=("row",), loss_budget=1.0, noise_budget=9.0
        )
        adaptive = AdaptivePrecision(settings)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 32))
        trainer = make("bf16", model=model, optimizer=optimizer, callbacks=[adaptive], seed=1)
        for number in range(20):
            torch.manual_seed(number)
            trainer.step((torch.randn(16, 32), torch.randint(0, 32, (16,))))
        trainer.settle()
        seen = adaptive._gradients.read()
        return trainer, [str(decision) for decision in trainer.plan.decisions], seen

    first, decisions, seen = run(adamw)
    second, same_decisions, also_seen = run(host())
    assert any("row" in decision for decision in decisions)
    assert decisions == same_decisions
    assert seen == also_seen
    assert equal(first, second)


def test_the_records_say_how_it_is_offloaded():
    trainer = make(optimizer=host(mode="speculative"))
    found = describe(trainer)["offload"]
    assert (found["mode"], found["share"]) == ("speculative", 1.0)
    assert found["freed_bytes"] == 12 * sum(p.numel() for p in trainer.model.parameters())
    assert (found["pinned"], found["pinning_refused"]) == (False, None)
    assert "offload" not in describe(make())


def test_the_records_say_that_memory_could_not_be_pinned(monkeypatch):
    def refuse(values, dtype):
        raise RuntimeError("locked memory is used up")

    real = arena.allocate
    monkeypatch.setattr(arena, "_pinned", refuse)
    monkeypatch.setattr(arena, "allocate", lambda values, dtype, *, pin: real(values, dtype, pin=True))
    found = describe(make(optimizer=host()))["offload"]
    assert (found["pinned"], found["pinning_refused"]) == (False, "locked memory is used up")


# -- refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_grad_norm": 1.0}, r"max_grad_norm=1\.0.*Pass max_grad_norm to the trainer"),
        ({"mode": "immediate", "undo": False, "check_finite": False}, "mode 'immediate'.*or step by hand"),
        ({"accumulation": 3}, r"accumulation=3.*gradient_accumulation_steps=2.*Leave accumulation out"),
    ],
)
def test_settings_that_are_the_trainers(settings, message):
    model = net()
    with pytest.raises(ConfigError, match=message):
        make(model=model, optimizer=host(**settings), gradient_accumulation_steps=2)


@pytest.mark.stress
def test_compiled_code_sends_its_gradients_too():
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    made = [
        make("bf16", model=copy.deepcopy(model), optimizer=optimizer, compile=True, gradient_accumulation_steps=2)
        for optimizer in (adamw, host())
    ]
    for trainer in each(*made):
        for batch in batches(4):
            trainer.step(batch)
    assert equal(*made)


def test_hooks_of_modules_in_compiled_code_are_refused():
    model = net()
    optimizer = OffloadedOptimizer(model.parameters(), model=model)
    with pytest.raises(ConfigError, match=r"with model=, and compile=True.*Leave model= out"):
        make(model=model, optimizer=optimizer, compile=True)


def test_a_model_that_was_moved_is_refused():
    model = net()
    optimizer = OffloadedOptimizer(model.parameters())
    model.bfloat16()
    with pytest.raises(ConfigError, match=r"moved from cpu torch\.float32 to cpu torch\.bfloat16"):
        offloaded.take_offloaded(optimizer, model, make(optimizer=adamw).config)


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(ConfigError, match="holds none of the model's trainable parameters"):
        make(optimizer=OffloadedOptimizer(net().parameters()))


def test_other_optimizers_are_left_alone():
    optimizer = adamw(net().parameters())
    offloaded.take_offloaded(optimizer, net(), make().config)
    assert offloaded.masters(optimizer) == {}
    assert offloaded.type_name(optimizer) == "AdamW"
    assert offloaded.updates_are_seen(optimizer)
    with offloaded.paused(optimizer), offloaded.trial_steps(optimizer):
        offloaded.between_steps(optimizer)


def test_hooks_that_may_step_are_told_from_ours():
    model = net()
    optimizer = host()(model.parameters())
    params = list(model.parameters())
    assert not offloaded.step_in_backward(params, optimizer)
    assert offloaded.step_in_backward(params, adamw(params))
    params[0].register_post_accumulate_grad_hook(lambda _: None)
    assert offloaded.step_in_backward(params, optimizer)
