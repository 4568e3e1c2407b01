"""A step is a transaction: with a fault in it, in any precision, it might never have been.

Bits are compared, with the state before the fault and with the end of a run that never met it. B01 in a
name is the number in the project's list of faults.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepseek_mp.errors import NonFiniteError
from deepseek_mp.testing import Fault, FaultInjector, InjectedError

MODES = ["fp32", "bf16", "fp16"]
NAN, INF = float("nan"), float("inf")
FAULTS = {
    "loss_nan": {"kind": "nan", "where": "loss"},
    "gradient_inf": {"kind": "inf", "where": "gradient", "module": "body.0"},
    "activation_inf": {"kind": "inf", "where": "activation", "module": "body.2"},
    "input_nan": {"kind": "nan", "where": "input"},
}


def fused(params):
    return torch.optim.AdamW(params, lr=0.01, fused=True)


def cross_entropy(output, target):
    return F.cross_entropy(output.float(), target)


def with_faults(make_trainer, mode, *faults, **options):
    """A trainer and what injects the faults into it, its loss function included."""
    trainer = make_trainer(mode, loss_fn=lambda *both: spoiled(*both), **options)
    injector = FaultInjector(trainer.model)
    for fault in faults:
        injector.add(fault)
    spoiled = injector.loss(cross_entropy)
    return trainer, injector


# ------------------------------------------------------------------------ a step is a transaction


@pytest.fixture
def train(make_trainer, make_batches):
    """Windows of micro-batches, one of them with a fault, or left out; returns (trainer, results)."""

    def run(mode, *, fault=None, window=2, position=0, leave_out=False, windows=4, each=3, **options):
        trainer, faults = with_faults(make_trainer, mode, gradient_accumulation_steps=each)
        if fault is not None:
            faults.add(Fault(**fault, steps={window * each + position}))
        results = []
        with faults:
            for faults.step, batch in enumerate(make_batches(windows * each)):
                if not (leave_out and faults.step // each == window):
                    results.append(trainer.step(batch))
        return trainer, results

    return run


@pytest.fixture(scope="module")
def controls():
    return {}


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("mode", MODES)
def test_b01_a_window_with_a_fault_might_never_have_been(mode, fault, position, train, controls, state_of, assert_same):
    """Wherever in the window it is: the run ends with the bits of one that never saw the window."""
    if mode not in controls:
        controls[mode] = state_of(train(mode, leave_out=True)[0])
    trainer, results = train(mode, fault=FAULTS[fault], position=position)
    assert [r.status for r in results[2::3]] == ["applied", "applied", "skipped", "applied"]
    assert (trainer.steps_attempted, trainer.steps_applied) == (4, 3)
    assert_same(state_of(trainer), controls[mode])


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("mode", MODES)
def test_b01_everything_is_as_it_was_right_after_the_fault(
    mode, fault, make_trainer, make_batches, state_of, assert_same
):
    trainer, faults = with_faults(make_trainer, mode, Fault(**FAULTS[fault]))
    batches = make_batches(3)
    for batch in batches[:2]:
        assert trainer.step(batch).status == "applied"
    before = state_of(trainer)
    with faults:
        result = trainer.step(batches[2])
    assert result.status == "skipped"
    assert_same(state_of(trainer), before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", FAULTS)
def test_b01_the_same_where_only_the_device_knows_the_verdict(
    fault, mode, make_trainer, make_batches, state_of, assert_same, late_verdict
):
    """The host learns of the fault while it is busy with the next step, whose gradients must survive it."""
    ends = []
    for skipped in (True, False):
        trainer, faults = with_faults(make_trainer, mode, Fault(**FAULTS[fault], steps={2}), optimizer=fused)
        with faults:
            for faults.step, batch in enumerate(make_batches(5)):
                if faults.step != 2 or skipped:
                    trainer.step(batch)
                    assert trainer.stepper.unsettled == (faults.step > 0)
        ends.append(state_of(trainer))
        assert (trainer.steps_attempted, trainer.steps_applied) == (4 + skipped, 4)
    assert_same(*ends)


class Margin(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, output, target):
        return cross_entropy(output * self.temperature, target)


@pytest.mark.parametrize("late", [False, True], ids=["host", "device"])
def test_b01_parameters_outside_the_model_are_part_of_the_transaction(late, make_trainer, make_batches, request):
    """Above all, finding the culprit leaves no gradient on them: it would spoil every later step."""
    if late:
        request.getfixturevalue("late_verdict")
    ends = []
    for leave_out in (False, True):
        loss_fn = Margin()
        trainer = make_trainer("fp32", scheduler=None, loss_fn=loss_fn, optimizer=lambda params: fused(
            [*params, *loss_fn.parameters()]  # noqa: B023
        ))  # fmt: skip
        for i, (x, y) in enumerate(make_batches(4)):
            if not (i == 1 and leave_out):
                trainer.step((x * NAN if i == 1 else x, y))
        trainer.settle()
        assert trainer.steps_applied == 3
        ends.append(loss_fn.temperature.detach().clone())
    assert ends[0] != 1.0
    assert torch.equal(*ends)


def test_b01_theirs_one_nan_loss_ruins_bf16_training_for_ever(make_model, make_batches):
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for i, (x, y) in enumerate(make_batches(4)):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model(x), y) * (NAN if i == 1 else 1.0)
        loss.backward()
        optimizer.step()
    assert all(param.isnan().all() for param in model.parameters())


# -------------------------------------------------------------------------- naming the bad module


class BadBackward(nn.Module):
    """Finite forward, infinite gradient."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * INF

    def forward(self, x):
        return self.Function.apply(x)


def nested(module):
    return nn.Sequential(nn.Linear(4, 8), nn.ModuleDict({"inner": nn.Sequential(nn.Tanh(), module)})["inner"],
                         nn.Linear(8, 3))  # fmt: skip


def fp16_weights_too_large():
    linear = nn.Linear(8, 8)
    nn.init.constant_(linear.weight, 1e6)
    return linear


BAD_MODULES = {
    "backward": ("fp32", BadBackward),
    "weight_overflow": ("fp16", fp16_weights_too_large),
}


@pytest.mark.parametrize("kind", BAD_MODULES)
def test_the_error_names_the_module_that_produced_the_first_bad_value(kind, make_trainer, make_batches):
    mode, module = BAD_MODULES[kind]
    trainer = make_trainer(mode, model=nested(module()), max_skipped_steps=1)
    with pytest.raises(NonFiniteError, match=r"first bad module: '1\.1'") as error:
        trainer.step(make_batches(1)[0])
    assert (error.value.first_bad_module, error.value.skipped) == ("1.1", 1)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ({"kind": "nan", "where": "activation", "module": "body.1"}, "body.1"),
        # The gradient of the second module's input is what the second module computes.
        ({"kind": "inf", "where": "gradient", "module": "body.0"}, "body.1"),
        ({"kind": "nan", "where": "loss"}, "(loss function)"),
    ],
    ids=["activation", "gradient", "loss"],
)
@pytest.mark.parametrize("mode", MODES)
def test_the_error_names_where_each_kind_of_fault_is(mode, fault, named, make_trainer, make_batches):
    trainer, faults = with_faults(make_trainer, mode, Fault(**fault), max_skipped_steps=1)
    with faults, pytest.raises(NonFiniteError, match="Parameters are those of the last good step") as error:
        trainer.step(make_batches(1)[0])
    assert error.value.first_bad_module == named


def test_a_finite_loss_with_a_bad_gradient_is_the_loss_functions_fault(make_trainer, make_batches):
    """The root of zero is zero, its slope is not finite."""
    trainer = make_trainer("fp32", loss_fn=lambda output, target: (output - output).abs().sqrt().sum())
    facts = trainer.step(make_batches(1)[0]).facts
    assert (facts.loss, facts.reason) == (0.0, "the gradients are not finite")
    assert facts.first_bad_module == "(loss function)"


def test_a_batch_with_nan_is_named_itself(make_trainer, make_batches):
    x, y = make_batches(1)[0]
    x[3, 2] = NAN
    assert make_trainer("fp32").step((x, y)).first_bad_module == "(batch)"


# ----------------------------------------------------------------------------------- random numbers


class WithDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.dropout = nn.Linear(4, 3), nn.Dropout(0.5)

    def forward(self, x):
        return self.layer(self.dropout(x))


@pytest.fixture
def dropout_run(make_trainer, make_batches, state_of):
    """The end of a run with dropout whose third batch is bad ('skip') or drawn for by hand ('drop')."""

    def run(third):
        torch.manual_seed(7)
        model = WithDropout()
        trainer = make_trainer("fp32", model=model)
        for i, (x, y) in enumerate(make_batches(6)):
            if i == 2 and third == "drop":
                F.dropout(torch.ones_like(x), 0.5)
            else:
                trainer.step((x * (NAN if i == 2 else 1.0), y))
        return state_of(trainer), torch.get_rng_state()

    return run


def test_a_skipped_step_draws_the_random_numbers_of_its_forward_once(dropout_run, assert_same):
    """What is guaranteed: the stream goes on as after an applied step. The replay draws nothing."""
    (skipped, skipped_rng), (dropped, dropped_rng) = dropout_run("skip"), dropout_run("drop")
    assert torch.equal(skipped_rng, dropped_rng)
    assert_same(skipped, dropped)


def test_the_replay_meets_the_masks_of_the_step_it_replays(make_trainer):
    """The fault needs the mask that the step drew: half of the masks hide it."""

    class Fragile(WithDropout):
        def forward(self, x):
            return self.layer(torch.log1p(self.dropout(x).clamp(max=-1.0)))

    named = []
    for seed in range(12):
        torch.manual_seed(seed)
        trainer = make_trainer("fp32", model=Fragile())
        x = torch.tensor([[-2.0, 0.0, 0.0, 0.0]])
        result = trainer.step((x, torch.zeros(1, dtype=torch.long)))
        named.append((result.status, result.first_bad_module))
    assert set(named) == {("skipped", "Fragile")}


def test_an_exception_takes_the_random_stream_back_so_that_a_retry_is_the_same_step(
    make_trainer, make_batches, state_of, assert_same
):
    batches, ends = make_batches(3), []
    for where in ("activation", "gradient", "optimizer", None):
        torch.manual_seed(7)
        trainer = make_trainer("fp32", model=WithDropout())
        trainer.step(batches[0])
        if where is not None:
            faults = FaultInjector(trainer.model, trainer.optimizer)
            faults.add(Fault(kind="raise", where=where, module="" if where == "optimizer" else "dropout"))
            with faults, pytest.raises(InjectedError, match=where):
                trainer.step((batches[1][0].requires_grad_(), batches[1][1]))
        for batch in batches[1:]:
            trainer.step(batch)
        assert (trainer.steps_attempted, trainer.steps_applied) == (3, 3)
        ends.append(state_of(trainer))
    for end in ends[:-1]:
        assert_same(end, ends[-1])
