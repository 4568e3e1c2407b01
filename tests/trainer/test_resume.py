"""What a checkpoint of a trainer consists of, and in which order it is read back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_model
from torch import nn
from torch.nn import functional as F

from deepseek_mp import (
    AdaptivePrecision,
    AdaptiveSettings,
    Callback,
    Decision,
    MixedPrecisionTrainer,
    PrecisionPlan,
    Reason,
)
from deepseek_mp.errors import CheckpointError, ConfigError, NonFiniteError
from deepseek_mp.optim.offload import OffloadedOptimizer
from deepseek_mp.trainer import resume, state
from deepseek_mp.trainer.checkpoint import read_checkpoint
from deepseek_mp.trainer.resume import checkpoint_root, resumed_plan


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def make(**options):
    return MixedPrecisionTrainer(net(), "fp32", device="cpu", **options)


def batches(count=3):
    inputs = torch.randn(4 * count, 4, generator=torch.Generator().manual_seed(1))
    return list(zip(inputs.split(4), inputs[:, :2].argmax(dim=1).split(4), strict=True))


class Twice(nn.Module):
    """Uses a layer twice, whose gradients are added up in BF16 where both uses share a cast."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.layer(self.layer(x).sin()))


class Centred(nn.Module):
    """A loss that is trained beside the model, and keeps a running mean of its outputs."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, output, target):
        self.mean.lerp_(output.detach().mean(0), 0.1)
        return F.cross_entropy((output - self.mean) * self.factor, target)


class Remembers(Callback):
    """A callback with a state that holds a tensor."""

    def __init__(self, value=0.0):
        self.value = torch.tensor([value])

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def test_a_folder_of_checkpoints_is_found_or_made_under_the_path(tmp_path):
    assert checkpoint_root(tmp_path / "run") == tmp_path / "run" / "checkpoints"
    assert checkpoint_root(tmp_path / "checkpoints") == tmp_path / "checkpoints"


def test_a_checkpoint_is_named_by_its_step_and_loads_into_the_plain_model(tmp_path):
    trainer = make(ema_decay=0.9)
    trainer.fit(batches())
    path = trainer.save(tmp_path)
    assert path == tmp_path / "checkpoints" / "step-00000003"
    assert trainer.save(tmp_path / "checkpoints") == path
    plain = net()
    load_model(plain, path / "model.safetensors")
    assert all(torch.equal(v, trainer.model.state_dict()[name]) for name, v in plain.state_dict().items())
    assert [type(module) for module in plain] == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]


def test_a_checkpoint_holds_every_part_of_the_run(tmp_path):
    trainer = make(ema_decay=0.9, callbacks=[Remembers(), Callback()], gradient_accumulation_steps=2)
    trainer.fit(batches())
    trainer.step(batches()[0])
    snapshot = read_checkpoint(trainer.save(tmp_path))
    assert snapshot.tensors.keys() == {
        "model", "buffers", "optimizer", "outside", "ema", "window", "rng", "state"
    }  # fmt: skip
    assert snapshot.state.keys() == {
        "version", "plan", "counters", "optimizer", "scheduler", "scaler", "position", "window", "epoch", "history",
        "callbacks", "adaptive", "memory",
    }  # fmt: skip
    assert snapshot.state["counters"] == {"attempted": 2, "applied": 2, "skipped_in_row": 0}
    assert snapshot.state["window"]["micro_batches"] == 1
    assert {"python", "torch"} <= {name.removeprefix("now.") for name in snapshot.tensors["rng"]}
    assert snapshot.state["callbacks"][1] is None


def test_the_state_is_json_that_a_person_can_read(tmp_path):
    trainer = make()
    trainer.fit(batches())
    values = json.loads((trainer.save(tmp_path) / "state.json").read_text())
    assert values["plan"]["base"] == "fp32"
    assert values["optimizer"]["groups"][0]["params"] == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "3.weight",
        "3.bias",
    ]


def test_tensors_in_the_state_of_a_callback_come_back(tmp_path):
    first = make(callbacks=[Remembers(5.0)])
    first.fit(batches())
    first.save(tmp_path)
    second = make(callbacks=[Remembers()])
    second.fit(batches(), resume=tmp_path)
    assert second.callbacks[0].value.item() == 5.0


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_the_averages_of_what_was_unfrozen_while_it_trained_come_back(tmp_path, frozen):
    def made(trains):
        model = net()
        model[0].requires_grad_(trains)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return MixedPrecisionTrainer(model, "fp32", device="cpu", ema_decay=0.9, optimizer=optimizer)

    run, data = made(False), batches(4)
    run.step(data[0])
    run.model[0].requires_grad_(True)
    run.step(data[1])
    run.step(data[2])
    run.save(tmp_path)
    resumed = made(not frozen)
    resumed.load(tmp_path)
    assert resumed.ema.values.keys() == run.ema.values.keys()
    resumed.model[0].requires_grad_(True)
    for each in (run, resumed):
        each.step(data[3])
        each.settle()
    assert all(torch.equal(value, resumed.ema.values[name]) for name, value in run.ema.values.items())


def test_history_counters_and_epochs_continue(tmp_path):
    first = make()
    first.fit(batches(), 2)
    first.save(tmp_path)
    second = make()
    result = second.fit(batches(), 3, resume=tmp_path)
    assert [entry["epoch"] for entry in result.history] == [0, 1, 2]
    assert result.history[:2] == tuple(first.history)
    assert (result.epochs, result.steps_attempted, result.steps_applied) == (3, 9, 9)


def test_a_run_with_nothing_left_to_do_only_reads(tmp_path):
    first = make()
    first.fit(batches(), 2)
    first.save(tmp_path)
    second = make()
    result = second.fit([], 2, resume=tmp_path)
    assert (result.epochs, result.steps_applied) == (2, 6)
    assert all(torch.equal(v, second.model.state_dict()[n]) for n, v in first.model.state_dict().items())


def test_the_random_state_is_put_back_before_the_first_batch(tmp_path):
    first = make()
    first.fit(batches())
    first.save(tmp_path)
    expected = torch.rand(2)
    second = make()
    torch.manual_seed(99)
    second.fit([], 0, resume=tmp_path)
    assert torch.equal(torch.rand(2), expected)


@pytest.mark.parametrize("done", [0, 2, 3])
def test_a_layer_that_is_used_twice_goes_on_with_the_same_bits(tmp_path, done):
    whole, later = (
        MixedPrecisionTrainer(Twice(), "bf16", device="cpu", gradient_accumulation_steps=2) for _ in range(2)
    )
    some = batches(8)
    for batch in some[:done]:
        whole.step(batch)
    if not done:  # it is as new as the run that it continues
        later.step(some[7])
    later.load(whole.save(tmp_path))
    for batch in some[done:]:
        whole.step(batch)
        later.step(batch)
    assert all(map(torch.equal, whole.model.parameters(), later.model.parameters()))


def test_on_fit_start_sees_the_resumed_run(tmp_path):
    seen = []

    class Looks(Callback):
        def on_fit_start(self, trainer):
            seen.append((trainer.steps_applied, trainer.position.epoch))

    first = make(callbacks=[Looks()])
    first.fit(batches())
    first.save(tmp_path)
    make(callbacks=[Looks()]).fit(batches(), 2, resume=tmp_path)
    assert seen == [(0, 0), (3, 1)]


def test_resuming_drops_what_the_trainer_had_done_before(tmp_path):
    first = make()
    first.fit(batches())
    first.save(tmp_path)
    expected = {name: value.clone() for name, value in first.model.state_dict().items()}
    first.fit(batches(), 4)
    first.fit([], 1, resume=tmp_path)
    assert all(torch.equal(value, expected[name]) for name, value in first.model.state_dict().items())
    assert (first.steps_applied, first.position.epoch, len(first.history)) == (3, 1, 1)


def test_skipped_steps_in_a_row_are_counted_across_a_resume(tmp_path):
    bad = [(torch.full((4, 4), float("nan")), torch.zeros(4, dtype=torch.long))]
    first = make(max_skipped_steps=3)
    first.fit(bad, 2)
    first.save(tmp_path)
    with pytest.raises(NonFiniteError, match="3 steps in a row were skipped"):
        make(max_skipped_steps=3).fit(bad, 3, resume=tmp_path)


def test_saving_needs_a_plan(tmp_path):
    trainer = MixedPrecisionTrainer(net(), "auto", device="cpu")
    with pytest.raises(ConfigError, match=r"save before the first step.*Train first"):
        trainer.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_json_cannot_hold_is_refused_by_its_place(tmp_path):
    class Odd(Callback):
        def state_dict(self):
            return {"x": [object()]}

    trainer = make(callbacks=[Odd()])
    trainer.fit(batches())
    with pytest.raises(CheckpointError, match=r"state\.callbacks\[0\]\.x\[0\] is a builtins\.object"):
        trainer.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_error_after_the_checks_would_be_ours(tmp_path, monkeypatch):
    """Checks come before the first change: if a check is left out, the order is what keeps a run whole."""
    order = []
    for name in ("check_tensors", "check_optimizer", "load_model", "load_optimizer"):
        real = getattr(state, name)
        monkeypatch.setattr(state, name, lambda *a, real=real, name=name: (order.append(name), real(*a))[1])
    monkeypatch.setattr(resume, "read_checkpoint", lambda path: (order.append("read"), read_checkpoint(path))[1])
    trainer = make()
    trainer.fit(batches())
    trainer.save(tmp_path)
    make().fit([], 0, resume=tmp_path)
    assert order == ["read", "check_tensors", "check_optimizer", "check_tensors", "load_model", "load_optimizer"]


def measured():
    whole = Decision(layer="", old="fp32", new="bf16", reason=Reason.MEASURED_FASTEST, evidence={"bf16_ms": 1.5})
    plan = PrecisionPlan.of("bf16", {"head": "fp32"})
    return PrecisionPlan(base=plan.base, rules=plan.rules, decisions=(whole,))


@pytest.mark.parametrize("pin", [{}, {"head": "fp32"}])
def test_a_resumed_plan_is_the_saved_one_and_says_so(pin):
    plan = resumed_plan(measured(), pin)
    assert plan.digest == measured().digest
    assert plan.decisions[0].reason == Reason.RESUMED
    assert plan.decisions[0].evidence == {"first_reason": "measured_fastest", "bf16_ms": 1.5}


@pytest.mark.parametrize("pin", [{"head": "bf16"}, {"stem": "fp32"}])
def test_pins_of_the_resuming_run_come_first(pin, caplog):
    plan = resumed_plan(measured(), pin)
    assert [rule.pattern for rule in plan.rules] == [*pin, "head"]
    assert plan.decisions == ()
    assert "resumed with the pins" in caplog.text


def lowered(precision, callbacks=(), **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    return MixedPrecisionTrainer(
        model, precision, emulate=True, device="cpu", callbacks=list(callbacks), progress=False, **options
    )


def live():
    return AdaptivePrecision(
        AdaptiveSettings(warm_up=2, probe_every=1, decide_every=2, recipes=("row",), loss_budget=1.0, noise_budget=99.0)
    )


def vectors():
    return [(torch.randn(16, 32), torch.randint(0, 8, (16,))) for _ in range(8)]


@pytest.fixture
def with_lowered_layers(tmp_path):
    made = lowered("bf16", [live()])
    made.fit(vectors())
    assert made.plan.rules, "layers were lowered"
    made.save(tmp_path)
    return tmp_path


def test_that_live_precision_lowered_layers_is_no_difference_of_the_plans(with_lowered_layers, caplog):
    lowered("bf16", [live()]).load(with_lowered_layers)
    assert "resumed" not in caplog.text


def test_what_differs_beside_lowered_layers_is_said(with_lowered_layers, caplog):
    lowered("bf16", [live()], pin={"4": "fp32"}).load(with_lowered_layers)
    assert "resumed with a changed plan bf16: 4 is fp32, was bf16" in caplog.text
    assert "0 is" not in caplog.text


def test_without_live_precision_layers_go_back_to_a_plan_that_is_named(with_lowered_layers, caplog):
    made = lowered("bf16")
    made.load(with_lowered_layers)
    assert not made.plan.rules
    assert "resumed without live precision a run that was with; layers go back to the plan that" in caplog.text
    assert "changed plan" not in caplog.text


def test_with_live_precision_a_named_plan_is_where_it_begins(tmp_path, caplog):
    made = lowered("bf16", pin={"4": "fp32"})
    made.fit(vectors())
    made.save(tmp_path)
    lowered("bf16", [live()]).load(tmp_path)
    assert "was without; it goes on from the plan that this run has" in caplog.text
    assert "resumed with a changed plan bf16: 4 is bf16, was fp32" in caplog.text


@pytest.mark.parametrize("kind", [torch.optim.AdamW, OffloadedOptimizer])
@pytest.mark.parametrize("steps", [2, 3])
def test_a_loss_with_parameters_and_buffers_goes_on_where_it_was_also_within_a_window(tmp_path, kind, steps):
    def trainer_with_loss():
        model, loss = net(), Centred()
        optimizer = kind([*model.parameters(), *loss.parameters()], lr=0.1)
        return MixedPrecisionTrainer(
            model, "fp32", device="cpu", loss_fn=loss, optimizer=optimizer, gradient_accumulation_steps=2
        )

    whole, first, second = (trainer_with_loss() for _ in range(3))
    parts = batches(6)
    for part in parts:
        whole.step(part)
    for part in parts[:steps]:
        first.step(part)
    first.save(tmp_path)
    second.load(tmp_path)
    for part in parts[steps:]:
        second.step(part)
    for part in ("model", "loss_fn"):
        ours, theirs = getattr(second, part).state_dict(), getattr(whole, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part
