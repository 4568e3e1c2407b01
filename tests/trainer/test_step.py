"""One step: windows, results, weights, sampling, and what a region is made of."""

from __future__ import annotations

import copy
import math
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepseek_mp import MixedPrecisionTrainer, StepResult
from deepseek_mp.errors import BatchError, NonFiniteError
from deepseek_mp.trainer import step
from deepseek_mp.trainer.step import VETOED

CPU = torch.device("cpu")


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def make(mode="fp32", **options):
    options = {
        "loss_scale_policy": 64.0,
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.5),
        "device": "cpu",
        "emulate": True,
    } | options
    return MixedPrecisionTrainer(options.pop("model", None) or net(), mode, **options)


def batch(size=6, seed=1):
    inputs = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))
    return inputs, inputs[:, :3].argmax(dim=1)


def spoiled():
    inputs, labels = batch()
    inputs[0, 0] = math.nan
    return inputs, labels


def loss_and_norm(parts):
    model = net()
    inputs, labels = torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])
    loss = F.cross_entropy(model(inputs), labels)
    loss.backward()
    return loss.item(), nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()


# -- results ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_a_step_reports_loss_norm_and_scale(mode):
    trainer = make(mode)
    result = trainer.step(batch())
    loss, norm = loss_and_norm([batch()])
    close = {"fp32": 1e-6, "bf16": 2e-2, "fp16": 3e-3}[mode]
    assert isinstance(result, StepResult)
    assert (result.status, result.reason, result.first_bad_module) == ("applied", "", None)
    assert result.loss == pytest.approx(loss, rel=close)
    assert result.grad_norm == pytest.approx(norm, rel=close)
    assert result.scale == (64.0 if mode == "fp16" else 1.0)


def test_micro_batches_are_accumulated_until_the_window_is_full():
    trainer = make(gradient_accumulation_steps=3)
    parts = [batch(6, 1), batch(2, 2), batch(4, 3)]
    results = [trainer.step(part) for part in parts]
    assert [result.status for result in results] == ["accumulated", "accumulated", "applied"]
    assert results[0].loss == pytest.approx(loss_and_norm([parts[0]])[0])
    loss, norm = loss_and_norm(parts)
    assert (results[2].loss, results[2].grad_norm) == (pytest.approx(loss), pytest.approx(norm))
    assert results[0].grad_norm is None
    assert (trainer.steps_attempted, trainer.steps_applied) == (1, 1)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_window_closes_when_told(accumulation):
    trainer = make(gradient_accumulation_steps=accumulation)
    assert trainer.step(batch(6, 1), close=False).status == "accumulated"
    result = trainer.step(batch(2, 2), close=True)
    loss, norm = loss_and_norm([batch(6, 1), batch(2, 2)])
    assert (result.loss, result.grad_norm) == (pytest.approx(loss), pytest.approx(norm))
    assert trainer.stepper.window.micro_batches == 0


def test_the_loss_of_an_accumulated_result_stays_what_it_was():
    trainer = make("fp16", gradient_accumulation_steps=2)
    first = trainer.step(batch(6, 1))
    trainer.step(batch(6, 2))
    trainer.step(batch(6, 3))
    assert first.loss == pytest.approx(loss_and_norm([batch(6, 1)])[0], rel=3e-3)
    assert first.scale == 64.0


def test_clipping_bounds_the_update_by_the_unscaled_norm():
    free, clipped = make("fp16"), make("fp16", max_grad_norm=0.01)
    before = [p.clone() for p in free.model.parameters()]
    norm = free.step(batch()).grad_norm
    assert clipped.step(batch()).grad_norm == norm
    moved = torch.cat([(p - q).flatten() for p, q in zip(clipped.model.parameters(), before, strict=True)])
    assert moved.norm().item() == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_gradients_are_gone_after_a_step_and_were_there_before():
    seen = []
    trainer = make()
    trainer.optimizer.register_step_pre_hook(
        lambda *_: seen.append([p.grad is not None for p in trainer.model.parameters()])
    )
    trainer.step(batch())
    assert seen == [[True] * 4]
    assert all(p.grad is None for p in trainer.model.parameters())


def test_gradients_left_by_someone_else_do_not_count():
    trainer, other = make(), make()
    F.cross_entropy(trainer.model(batch(4, 9)[0]), batch(4, 9)[1]).backward()
    for one in (trainer, other):
        one.step(batch())
    for p, q in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_a_step_that_is_not_finite_is_skipped_and_the_next_is_not(mode):
    trainer = make(mode)
    before = copy.deepcopy(trainer.model.state_dict())
    result = trainer.step(spoiled())
    assert (result.status, result.reason) == ("skipped", "the loss is nan")
    assert all(torch.equal(v, before[name]) for name, v in trainer.model.state_dict().items())
    assert trainer.step(batch()).status == "applied"


def test_one_bad_micro_batch_discards_its_window():
    trainer = make(gradient_accumulation_steps=2)
    trainer.step(batch())
    assert trainer.step(spoiled()).status == "skipped"
    trainer.step(batch())
    assert trainer.step(batch()).status == "applied"


def test_a_veto_takes_a_step_back_without_blaming_the_loss_scale():
    trainer = make("fp16", loss_scale_policy="dynamic")
    trainer.step(batch())
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.stepper.veto = lambda: torch.ones(())
    result = trainer.step(batch(seed=2))
    assert (result.status, result.first_bad_module) == ("skipped", None)
    assert result.reason == VETOED
    assert result.loss > 0
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    scale = result.scale
    trainer.stepper.veto = lambda: torch.zeros(())
    again = trainer.step(batch(seed=2))
    assert (again.status, again.scale) == ("applied", scale)
    assert trainer.stepper.skipped_in_row == 0


@pytest.mark.parametrize(("mode", "policy"), [("fp16", "dynamic"), ("fp16", "predictive"), ("bf16", "none")])
@pytest.mark.parametrize("where", ["loss", "gradients"])
def test_a_step_that_is_not_finite_is_no_matter_of_a_veto(mode, policy, where):
    results = []
    for vetoed in (False, True):
        trainer = make(mode, loss_scale_policy=policy)
        trainer.step(batch())
        if vetoed:
            trainer.stepper.veto = lambda: torch.ones(())
        if where == "loss":
            trainer.model[2].register_forward_hook(lambda module, args, output: output / 0.0)
        else:
            trainer.model[2].register_full_backward_hook(lambda module, given, taken: (given[0] / 0.0,))
        result = trainer.step(batch(seed=2))
        results.append((result.status, result.reason, result.first_bad_module, trainer.scaler.get_scale()))
        assert trainer.stepper.skipped_in_row == 1
    assert results[0] == results[1]
    assert results[0][2] is not None


@pytest.mark.parametrize("least", [0, 1], ids=["nan", "zero"])
def test_a_window_without_items_is_no_matter_of_a_veto(least):
    def loss_fn(output, labels):
        items = (labels != -100).sum()  # counted on the device
        return F.cross_entropy(output, labels, reduction="sum") / items.clamp(min=least), items

    trainer = make(loss_fn=loss_fn, loss_scale_policy="dynamic")
    trainer.step(batch())
    trainer.stepper.veto = lambda: torch.ones(())
    inputs, labels = batch()
    for items in (inputs[:0], labels[:0]), (inputs, torch.full_like(labels, -100)):
        result = trainer.step(items)
        assert (result.status, result.first_bad_module) == ("no_grads", None)


def test_vetoed_steps_are_not_counted_as_skips_in_a_row():
    trainer = make(max_skipped_steps=2)
    trainer.step(batch())
    trainer.step(spoiled())
    trainer.stepper.veto = lambda: torch.ones(())
    for _ in range(4):
        assert trainer.step(batch()).reason == VETOED
    assert trainer.stepper.skipped_in_row == 1, "nor do they end the row"
    with pytest.raises(NonFiniteError, match="2 steps in a row were skipped"):
        trainer.step(spoiled())
    assert trainer.step(batch()).reason == VETOED, "no error of its own"


def test_too_many_skips_in_a_row_are_an_error_that_names_the_place():
    trainer = make(max_skipped_steps=3)
    hook = trainer.model[2].register_forward_hook(lambda module, args, output: output / 0.0)
    for _ in range(2):
        trainer.step(batch())
    with pytest.raises(NonFiniteError, match=r"3 steps in a row were skipped.*first bad module: '2'") as caught:
        trainer.step(batch())
    assert (caught.value.first_bad_module, caught.value.skipped) == ("2", 3)
    hook.remove()
    assert trainer.step(batch()).status == "applied"
    assert trainer.stepper.skipped_in_row == 0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_empty_batch_is_no_step(accumulation):
    trainer = make(gradient_accumulation_steps=accumulation)
    inputs, labels = batch()
    results = [trainer.step((inputs[:0], labels[:0])) for _ in range(accumulation)]
    assert results[-1].status == "no_grads"
    assert (trainer.steps_attempted, trainer.steps_applied) == (1, 0)


def test_a_model_that_is_handed_over_in_eval_mode_is_trained():
    trainer = make(model=net().eval())
    trainer.step(batch())
    assert trainer.model.training


def test_parts_frozen_in_eval_mode_stay_so():
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    trainer = make(model=model)
    model[1].eval()
    mean = model[1].running_mean.clone()
    trainer.step(batch())
    trainer.evaluate([batch()])
    trainer.step(batch())
    assert torch.equal(model[1].running_mean, mean)
    assert (model.training, model[1].training) == (True, False)


# -- what a batch may be ------------------------------------------------------------------------------------


class Answer:
    def __init__(self, loss, logits):
        self.loss, self.logits = loss, logits


class HuggingFaceLike(nn.Module):
    """Takes keywords and returns an object with a loss, as the models of transformers do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Embedding(11, 8), nn.Linear(8, 11)

    def forward(self, input_ids, attention_mask=None, labels=None):
        hidden = self.body(input_ids)
        if attention_mask is not None:
            hidden = hidden * attention_mask.unsqueeze(-1)
        logits = self.head(hidden)
        return Answer(F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()), logits)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, left, right):
        return self.left(left) + self.right(right)


class OwnLoss(nn.Module):
    """Takes one tensor and returns its loss in a mapping."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, inputs):
        output = self.layer(inputs)
        return {"loss": (output - inputs).square().mean(), "output": output}


def tokens():
    drawn = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(1))
    return {"input_ids": drawn, "attention_mask": torch.ones(3, 5), "labels": drawn.roll(1)}


BATCHES = {
    "mapping": (HuggingFaceLike, tokens),
    "two inputs": (TwoInputs, lambda: ((batch()[0], batch()[0][:, :2]), batch()[1])),
    "keywords and target": (TwoInputs, lambda: ({"left": batch()[0], "right": batch()[0][:, :2]}, batch()[1])),
    "tensor": (OwnLoss, lambda: batch()[0]),
    "list": (net, lambda: list(batch())),
}


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("kind", BATCHES)
def test_every_form_of_batch_trains_evaluates_and_predicts(kind, mode):
    build, made = BATCHES[kind]
    trainer = make(mode, model=build(), gradient_accumulation_steps=2)
    before = trainer.evaluate([made()])["loss"]
    for _ in range(8):
        result = trainer.step(made())
    assert result.status == "applied"
    assert trainer.evaluate([made()])["loss"] < before
    assert trainer.predict(made()) is not None


def test_two_ways_to_pass_the_same_batch_give_the_same_step():
    one, two = make(model=TwoInputs()), make(model=TwoInputs())
    first = one.step(BATCHES["two inputs"][1]())
    second = two.step(BATCHES["keywords and target"][1]())
    assert first.facts == second.facts


BAD_BATCHES = {
    "three": (lambda: (*batch(), 3), r"a batch that is tuple of 3 \(Tensor, Tensor, int\)\. Allowed: a tensor; a pair"),
    "text": (lambda: "abc", "a batch that is str"),
    "none": (lambda: None, "a batch that is NoneType"),
    "no tensors": (lambda: (("a", "b"), batch()[1]), r"a pair whose input is tuple of 2 \(str, str\)"),
    "keys": (lambda: {1: batch()[0]}, "a batch that is dict with keys"),
    "target": (lambda: (batch()[0], "y"), r"output float32 \[6, 3\] with target str.*no loss can be inferred.*loss_fn"),
    "mismatch": (lambda: (batch()[0], batch()[1][:2]), r"output float32 \[6, 3\] with target int64 \[2\]"),
    "no target": (lambda: batch()[0], r"output float32 \[6, 3\] with target NoneType"),
}


@pytest.mark.parametrize("kind", BAD_BATCHES)
@pytest.mark.parametrize("mode", ["fp32", "auto"])
def test_a_batch_of_the_wrong_form_is_refused_without_a_trace(monkeypatch, kind, mode):
    monkeypatch.setenv("DEEPSEEK_MP_CACHE", "off")
    made, message = BAD_BATCHES[kind]
    trainer = make(mode)
    before, random_state = copy.deepcopy(trainer.model.state_dict()), torch.get_rng_state()
    with pytest.raises(BatchError, match=message) as caught:
        trainer.step(made())
    assert "Allowed: " in str(caught.value)
    assert all(torch.equal(v, before[name]) for name, v in trainer.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert trainer.steps_attempted == 0


BAD_LOSSES = {
    "vector": (lambda output, target: output.sum(dim=1), r"the loss is a tensor of shape \[6\].*Reduce it"),
    "number": (lambda output, target: 0.5, "the loss is a float.*before .item"),
    "integer": (lambda output, target: target.sum(), "the loss is a tensor of torch.int64"),
    "detached": (lambda output, target: output.detach().sum(), "without gradient history"),
    "tuple": (lambda output, target: (output.sum(), "6"), r"loss_fn returned a tuple of tuple of 2"),
    "module": (lambda output, target: nn.MSELoss(), "the loss is a MSELoss"),
}


@pytest.mark.parametrize("kind", BAD_LOSSES)
@pytest.mark.parametrize("mode", ["fp32", "auto"])
def test_a_loss_that_cannot_be_trained_on_is_refused_without_a_trace(monkeypatch, kind, mode):
    monkeypatch.setenv("DEEPSEEK_MP_CACHE", "off")
    loss_fn, message = BAD_LOSSES[kind]
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    trainer = make(mode, model=model, loss_fn=loss_fn)
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(BatchError, match=message):
        trainer.step(batch())
    assert all(torch.equal(v, before[name]) for name, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert trainer.steps_attempted == 0


# -- regions and samples ----------------------------------------------------------------------------------------


def test_an_fp32_plan_is_fp32_inside_a_region_of_the_caller():
    trainer, dtypes = make(), []
    trainer.model[0].register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        trainer.step(batch())
        trainer.predict(batch())
    assert dtypes == [torch.float32] * 2


@pytest.mark.parametrize(("every", "sampled"), [(1, 5), (2, 3), (4, 2), (500, 1)])
def test_every_so_many_windows_operations_are_counted(every, sampled):
    trainer = make(monitor_every=every)
    for _ in range(5):
        trainer.step(batch())
    usage = trainer.monitor.log_precision_usage()
    assert (usage.steps, usage.sampled_steps) == (5, sampled)
    assert usage.formats["fp32"].total > 0


def test_the_backward_of_a_counted_step_runs_on_the_step_s_own_thread():
    """Whatever the device: an error on a thread of autograd's may come back lost."""
    trainer, seen = make(monitor_every=2), []

    def forwarded(_module, _args, output):
        output.register_hook(lambda _gradient: seen.append(torch._C._is_multithreading_enabled()))

    next(trainer.model.modules()).register_forward_hook(forwarded)
    for _ in range(3):
        trainer.step(batch())
    assert seen == [False, False, True]
    assert torch._C._is_multithreading_enabled()


@pytest.mark.parametrize("options", [{}, {"memory": 1.0}, {"activations": True}, {"compile": True}], ids=str)
def test_what_a_batch_was_moved_as_is_gone_when_backward_begins(monkeypatch, options):
    """A model in BF16 keeps its own cast of FP32 inputs for backward."""
    seen = []

    def copied(call, device):
        inputs = call.args[0].clone()
        seen.append(weakref.ref(inputs))
        return replace(call, args=(inputs,))

    class Watched(nn.Linear):
        def forward(self, input):
            output = super().forward(input)
            output.register_hook(lambda _gradient: alive.append(seen[-1]() is not None))
            return output

    monkeypatch.setattr(step.calls, "move", copied)
    alive = []
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), Watched(8, 3))
    trainer = make("bf16", model=model, **options)
    for _ in range(3):
        trainer.step(batch())
    assert alive
    assert not any(alive[-2:])


def test_sampled_steps_have_the_same_numbers():
    often, never = make("bf16", monitor_every=1), make("bf16", monitor_every=10**6)
    for _ in range(2):
        assert often.step(batch()).facts == never.step(batch()).facts


def test_the_work_of_a_micro_batch_is_known_once_one_was_sampled():
    trainer = make(monitor_every=2, gradient_accumulation_steps=2)
    assert trainer.stepper.flops is None
    trainer.step(batch(6))
    assert trainer.stepper.flops == 2 * 6 * (4 * 8 + 8 * 3) + 2 * 6 * (4 * 8 + 2 * 8 * 3)


def test_a_scale_below_one_is_warned_of_once():
    trainer = make("fp16", loss_scale_policy=0.5)
    with pytest.warns(UserWarning, match=r"loss scale fell to 0.5.*Train in bf16"):
        trainer.step(batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.step(batch())


def test_the_loss_that_was_inferred_is_said_once(caplog):
    trainer = make()
    with caplog.at_level("INFO", "deepseek_mp"):
        for _ in range(2):
            trainer.step(batch())
    said = [record.getMessage() for record in caplog.records if "the loss is" in record.getMessage()]
    assert len(said) == 1
    assert "cross" in said[0]


class RunningLoss(nn.Module):
    """Divides by the running mean of its losses."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones(()))

    def forward(self, output, target):
        loss = F.cross_entropy(output, target)
        self.mean.lerp_(loss.detach(), 0.1)
        return loss / self.mean


def test_a_skipped_step_leaves_the_buffers_of_the_loss():
    trainer = make(loss_fn=RunningLoss())
    assert trainer.step(batch()).status == "applied"
    before = trainer.loss_fn.mean.clone()
    assert trainer.step(spoiled()).status == "skipped"
    assert torch.equal(trainer.loss_fn.mean, before)
    assert trainer.step(batch()).status == "applied"


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("instead", [False, True])
def test_gradients_of_parameters_that_the_optimizer_is_given_later_end_with_their_step(accumulation, instead):
    class Growing(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.factor = net(), None

        def forward(self, x):
            return self.base(x) if self.factor is None else self.base(x) * self.factor

    def grow(model, optimizer):
        model.factor = nn.Parameter(torch.ones(3))
        if instead:
            optimizer.param_groups[0]["params"] = [model.factor, *list(model.base.parameters())[1:]]
        else:
            optimizer.add_param_group({"params": [model.factor]})

    plain = Growing()
    by_hand = torch.optim.SGD(plain.parameters(), lr=0.5)
    trainer = make(model=Growing(), gradient_accumulation_steps=accumulation)
    for number in range(5):
        if number == 2:
            grow(plain, by_hand)
            grow(trainer.model, trainer.optimizer)
        by_hand.zero_grad()
        F.cross_entropy(plain(batch(seed=number)[0]), batch(seed=number)[1]).backward()
        by_hand.step()
        for _ in range(accumulation):
            trainer.step(batch(seed=number))
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(plain.parameters(), trainer.model.parameters(), strict=True)
    )
