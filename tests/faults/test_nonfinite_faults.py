"""What non-finite numbers leave behind in buffers, averages and records, and where they come from nothing.

The letters and numbers in the names are those of the project's list of faults, section B; B01 is in
test_transaction.py. Tests with `theirs` in the name run the same fault through plain PyTorch.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.ao.quantization import MovingAverageMinMaxObserver
from torch.nn import functional as F

from deepseek_mp import Callback
from deepseek_mp.records import read_run

NAN, INF = float("nan"), float("inf")


def fused(params):
    return torch.optim.AdamW(params, lr=0.01, fused=True)


def cross_entropy(output, target):
    return F.cross_entropy(output.float(), target)


# ------------------------------------------------------------------------------- B02 and B03 buffers


def bad_batch_between(trainer, batches):
    """Statuses of a good, a bad and another good step."""
    statuses = []
    for i, (x, y) in enumerate(batches[:3]):
        statuses.append(trainer.step((x * NAN if i == 1 else x, y)).status)
    return statuses


@pytest.mark.parametrize("how", ["host", "device"])
def test_b02_batchnorm_and_replaced_buffers_are_put_back(how, make_trainer, make_batches, request):
    if how == "device":
        request.getfixturevalue("late_verdict")
    batches = make_batches(3)
    trainer, control = (make_trainer("fp32", optimizer=fused) for _ in range(2))
    assert bad_batch_between(trainer, batches) == ["applied", "skipped", "applied"]
    for i in (0, 2):
        control.step(batches[i])
    assert trainer.model.body[1].num_batches_tracked == 2
    for (name, ours), (_, theirs) in zip(trainer.model.named_buffers(), control.model.named_buffers(), strict=True):
        assert torch.equal(ours, theirs), name
    assert trainer.predict(batches[0]).isfinite().all()


def test_b02_theirs_batchnorm_is_ruined_by_a_step_that_the_scaler_skipped(make_model, make_batches):
    model, scaler = make_model(), torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for i, (x, y) in enumerate(make_batches(3)):
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model(x * NAN if i == 1 else x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert all(param.isfinite().all() for param in model.parameters())  # the skip worked, and yet
    assert model.body[1].running_mean.isnan().all()
    assert model.eval()(make_batches(1)[0][0]).isnan().all()


def observed():
    """A model that watches its activations' range, as quantisation-aware training does."""
    return nn.Sequential(nn.Linear(4, 8), MovingAverageMinMaxObserver(), nn.Linear(8, 3))


@pytest.mark.parametrize("first", [True, False], ids=["first_batch", "later_batch"])
def test_b03_an_observer_keeps_its_range(first, make_trainer, make_batches):
    trainer, batches = make_trainer("fp32", model=observed()), make_batches(2)
    x, y = batches[0]
    if not first:
        trainer.step(batches[1])
    before = [(name, buffer.clone()) for name, buffer in trainer.model[1].named_buffers()]
    assert trainer.step((x * INF, y)).status == "skipped"
    assert [name for name, _ in before] == ["eps", "min_val", "max_val"]
    assert all(torch.equal(trainer.model[1].get_buffer(name), value) for name, value in before)
    trainer.step((x, y))
    assert trainer.model[1].calculate_qparams()[0].isfinite()


def test_b03_theirs_an_observer_has_no_scale_after_one_bad_batch(make_batches):
    model, scaler = observed(), torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for i, (x, y) in enumerate(make_batches(3)):
        optimizer.zero_grad()
        scaler.scale(cross_entropy(model(x * NAN if i == 1 else x), y)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert model[1].calculate_qparams()[0].isnan()


class FillsOnFirstUse(nn.Module):
    """A statistic that does not exist before the first forward, once declared and once not."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("mean", None)

    def forward(self, x):
        y = self.layer(x)
        self.mean = y.detach().mean() if self.mean is None else 0.9 * self.mean + 0.1 * y.detach().mean()
        self.register_buffer("last", y.detach().mean(), persistent=False)
        return y


@pytest.mark.parametrize("how", ["host", "device"])
def test_b02_a_buffer_that_the_bad_step_made_is_gone_again(how, make_trainer, make_batches, request):
    trainer, ((x, y), good) = make_trainer("fp32", model=FillsOnFirstUse(), optimizer=fused), make_batches(2)
    if how == "device":  # the verdict of a first step comes from the host there too
        request.getfixturevalue("late_verdict")
        trainer.scaler._is_first = lambda *_: False
    assert trainer.step((x * NAN, y)).status == "skipped"
    assert trainer.model.mean is None
    assert not hasattr(trainer.model, "last")
    assert trainer.step(good).status == "applied"
    assert trainer.model.mean.isfinite()


# ------------------------------------------------------------------- B04 averages, B05 logs, B13 batch


def test_b04_the_average_of_the_weights_ignores_a_bad_step(make_trainer, make_batches, late_verdict):
    trainer, batches = make_trainer("bf16", optimizer=fused), make_batches(3)
    trainer.step(batches[0])
    trainer.settle()
    before = {name: value.clone() for name, value in trainer.ema.values.items()}
    trainer.step((batches[1][0] * NAN, batches[1][1]))
    trainer.settle()
    assert all(torch.equal(trainer.ema.values[name], value) for name, value in before.items())
    trainer.step(batches[2])
    assert trainer.evaluate(batches)["loss"] < 2.0  # NaN is not


def test_b04_theirs_an_average_taken_after_a_bad_step_is_nan_for_ever(make_model, make_batches):
    model = make_model()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer, good = torch.optim.SGD(model.parameters(), lr=0.01), make_model().state_dict()
    for i, (x, y) in enumerate(make_batches(4)):
        optimizer.zero_grad()
        cross_entropy(model(x * NAN if i == 1 else x), y).backward()
        optimizer.step()
        average.update_parameters(model)
        model.load_state_dict(good)  # even with the weights repaired at once
    assert all(param.isnan().all() for param in average.module.parameters())


class Skips(Callback):
    def __init__(self):
        self.seen = []

    def on_skip(self, trainer, facts, batches):
        self.seen.append((facts.first_bad_module, batches))


def test_b05_metrics_show_the_nan_and_the_skip(tmp_path, make_trainer, make_batches):
    batches = make_batches(4)
    batches[2] = (batches[2][0] * NAN, batches[2][1])
    trainer = make_trainer("bf16", run_dir=tmp_path)
    result = trainer.fit(batches)
    assert [entry["skipped"] for entry in result.history] == [1]
    assert math.isfinite(result.loss)
    lines = [line for line in read_run(tmp_path).metrics if line["status"] != "epoch"]
    assert [line["status"] for line in lines] == ["applied", "applied", "skipped", "applied"]
    assert [line["applied"] for line in lines] == [1, 2, 2, 3]
    assert [math.isnan(line["loss"]) for line in lines] == [False, False, True, False]
    assert (lines[2]["reason"], lines[2]["first_bad_module"]) == ("the loss is nan", "(batch)")


@pytest.mark.parametrize("position", [0, 1, 2])
def test_b13_the_callback_receives_the_bad_batch_and_its_place(position, make_trainer, make_batches):
    batches, skips = make_batches(9), Skips()
    x, y = batches[3 + position]
    batches[3 + position] = (x * INF, y)
    make_trainer("fp32", gradient_accumulation_steps=3, callbacks=[skips]).fit(batches)
    ((module, window),) = skips.seen
    assert [index for index, _ in window] == [3, 4, 5]
    assert all(batch is batches[index] for index, batch in window)
    assert module == "body.0"


# ------------------------------------------------------------------------ B10 nothing in the batch


def own_with_count(output, target):
    """A mean over the labels that count, with their number left on the device."""
    count = (target != -100).sum()
    return F.cross_entropy(output.float(), target, reduction="sum") / count, count


LOSSES = {"inferred": None, "own": cross_entropy, "own_with_count": own_with_count}
EMPTY = {
    "no_samples": lambda x, y: (x[:0], y[:0]),
    "all_ignored": lambda x, y: (x, torch.full_like(y, -100)),
}


@pytest.mark.parametrize("each", [1, 2])
@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mode", ["fp32", "fp16"])
def test_b10_a_window_of_nothing_is_a_result_and_changes_nothing(
    mode, loss, empty, each, make_trainer, make_batches, state_of, assert_same
):
    trainer = make_trainer(mode, "dynamic", loss_fn=LOSSES[loss], gradient_accumulation_steps=each)
    batches = make_batches(2 * each)
    for batch in batches[:each]:
        trainer.step(batch)
    before = state_of(trainer)
    for batch in batches[each:]:
        result = trainer.step(EMPTY[empty](*batch))
    facts = result.facts
    assert (facts.status, facts.reason, facts.first_bad_module) == (
        "no_grads", "no batch of the window has items", None,
    )  # fmt: skip
    assert (trainer.steps_attempted, trainer.steps_applied) == (2, 1)
    # Where only the device knows the number of items, the step counts as a good one for the scale.
    assert_same(before, state_of(trainer), but=("scaler.good_steps",) if loss == "own_with_count" else ())


@pytest.mark.parametrize("empty", EMPTY)
@pytest.mark.parametrize("loss", ["inferred", "own"])
def test_b10_an_empty_micro_batch_adds_nothing_to_its_window(loss, empty, make_trainer, make_batches):
    full, ends = make_batches(2), []
    for batches in (full, [full[0], EMPTY[empty](*full[1]), full[1]]):
        model = nn.Sequential(nn.Linear(4, 3))
        nn.init.constant_(model[0].weight, 0.1)
        nn.init.zeros_(model[0].bias)
        trainer = make_trainer("fp32", model=model, loss_fn=LOSSES[loss], gradient_accumulation_steps=len(batches))
        for batch in batches:
            result = trainer.step(batch)
        ends.append((result.loss, model[0].weight.detach().clone()))
    assert ends[0][0] == ends[1][0]
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.parametrize("count", [torch.tensor(0), 0], ids=["device", "host"])
def test_b10_an_empty_window_on_the_device_neither_steps_nor_waits(count, make_trainer, make_batches, late_verdict):
    counts = iter([6, 6, count, count, 6, 6])
    trainer = make_trainer(
        "fp32", optimizer=fused, gradient_accumulation_steps=2,
        loss_fn=lambda output, target: (cross_entropy(output, target) * 1.0, next(counts)),
    )  # fmt: skip
    results = [trainer.step(batch) for batch in make_batches(6)]
    trainer.settle()
    assert [r.status for r in results[1::2]] == ["applied", "no_grads", "applied"]
    assert all(param.isfinite().all() for param in trainer.model.parameters())


def test_b10_theirs_a_mean_over_nothing_is_nan(make_model, make_batches):
    model, (x, y) = make_model().eval(), make_batches(1)[0]
    assert cross_entropy(model(x), torch.full_like(y, -100)).isnan()
    assert F.mse_loss(model(x[:0]), torch.ones(0, 3)).isnan()


# ------------------------------------------------------------------------- B11 reductions in fp16


@pytest.mark.parametrize("loss", [None, F.mse_loss], ids=["inferred", "own"])
def test_b11_the_squared_error_of_fp16_outputs_does_not_overflow(loss, make_trainer, make_batches):
    trainer = make_trainer("fp16", 1.0, loss_fn=loss, monitor_every=1)
    x, _ = make_batches(1)[0]
    result = trainer.step((x, torch.full((6, 3), 400.0)))
    assert result.status == "applied"
    assert 1e5 < result.loss < 2e5  # above 65504
    usage = trainer.monitor.log_precision_usage()
    rows = [(row.op, row.format, row.reason.value) for row in usage.fallbacks if row.op.startswith("mse_loss")]
    assert rows == [("mse_loss", "fp32", "autocast_list"), ("mse_loss_backward", "fp32", "autocast_list")]


def test_b11_theirs_the_squared_error_in_fp16_is_infinite():
    assert F.mse_loss(torch.full((4,), 400.0).half(), torch.zeros(4).half()).isinf()


class Attention(nn.Module):
    """Logits of 200000 before the softmax."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(4, 50, bias=False)
        nn.init.constant_(self.project.weight, 16.0)

    def forward(self, x):
        q = self.project(x)
        return (q @ q.mT).softmax(-1) @ x


def test_b11_attention_logits_that_overflow_are_named_and_fit_bf16(make_trainer):
    batch = torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    model = nn.Sequential(nn.Identity(), nn.ModuleDict({"heads": Attention()})["heads"], nn.Linear(4, 5))
    facts = make_trainer("fp16", model=model).step(batch).facts
    assert (facts.status, facts.first_bad_module) == ("skipped", "1")
    assert make_trainer("bf16", model=model).step(batch).status == "applied"
