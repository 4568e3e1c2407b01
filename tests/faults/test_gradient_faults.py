"""Gradients that a loss scaler must not get wrong: clipped, of any dtype, sparse, saturated, half done.

The letters and numbers in the names are those of the project's list of faults, section A from 17 on.
Tests with `theirs` in the name show what plain PyTorch does.
"""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from deepseek_mp import Callback, LossScaler, MixedPrecisionTrainer, PrecisionPlan, backends
from deepseek_mp.controller import DynamicLossScale
from deepseek_mp.errors import PlanError
from deepseek_mp.testing import Fault, FaultInjector

INF = float("inf")


def scaled(policy, *grads, lr=1.0, optimizer=torch.optim.SGD):
    """One step of parameters that start at zero on these gradients; the parameters and the verdict."""
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    scaler = LossScaler(policy)
    scaler.scale(torch.ones(()))
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    return params, scaler, optimizer(params, lr=lr)


def theirs(*grads, init_scale=1.0, lr=1.0):
    params = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    scaler.scale(torch.ones(()))
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    return params, scaler, torch.optim.SGD(params, lr=lr)


# ---------------------------------------------------------------------------- A17 to A20 clipping


class SeesGradients(Callback):
    def __init__(self):
        self.norms = []

    def on_gradients(self, trainer):
        norm = nn.utils.clip_grad_norm_(trainer.model.parameters(), 1e-3)
        self.norms.append(float(norm))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
def test_a17_a_clip_of_the_users_own_sees_unscaled_gradients(mode, fused, make_trainer, make_batches):
    sees = SeesGradients()
    trainer = make_trainer(
        mode, 1024.0, callbacks=[sees], optimizer=lambda params: torch.optim.AdamW(params, fused=fused)
    )
    reference = make_trainer("fp32")
    for batch in make_batches(2):
        result = trainer.step(batch)
        assert sees.norms[-1] == pytest.approx(reference.step(batch).grad_norm, rel=0.1)
        assert result.grad_norm == pytest.approx(1e-3, rel=1e-3)  # what the user left


def test_a17_theirs_a_clip_before_unscaling_makes_the_update_vanish():
    (param,), scaler, optimizer = theirs(torch.tensor([0.5 * 65536]), init_scale=65536.0)
    nn.utils.clip_grad_norm_([param], 1.0)
    scaler.step(optimizer)
    assert -param.item() == pytest.approx(1 / 65536, rel=0.01)  # 0.5 is right


def test_a18_clipping_works_with_fused_optimizers_in_fp16(make_trainer, make_batches):
    ends = []
    for fused in (False, True):
        trainer = make_trainer(
            "fp16", max_grad_norm=0.1, optimizer=lambda params: torch.optim.SGD(params, lr=1.0, fused=fused)  # noqa: B023
        )  # fmt: skip
        before = [param.detach().clone() for param in trainer.model.parameters()]
        assert trainer.step(make_batches(1)[0]).grad_norm > 0.1
        ends.append([param.detach() for param in trainer.model.parameters()])
        moved = torch.cat([(a - b).flatten() for a, b in zip(before, ends[-1], strict=True)])
        assert float(moved.norm()) == pytest.approx(0.1, rel=1e-4)
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("bad", [INF, -INF, float("nan")])
@pytest.mark.parametrize("policy", ["dynamic", "none"])
def test_a19_a_clip_whose_norm_is_not_finite_skips_the_step(policy, bad):
    params, scaler, optimizer = scaled(policy, torch.tensor([bad]), torch.tensor([3.0]))
    verdict = scaler.step(optimizer, max_grad_norm=1.0)
    assert verdict.status == "skipped"
    assert not math.isfinite(float(verdict.grad_norm))
    assert [param.item() for param in params] == [0.0, 0.0]


def test_a19_theirs_the_culprit_becomes_nan_and_all_others_stop():
    (a, b), _, optimizer = theirs(torch.tensor([INF]), torch.tensor([3.0]))
    nn.utils.clip_grad_norm_([a, b], 1.0)
    optimizer.step()
    assert a.isnan()
    assert b.item() == 0.0


def test_a20_the_norm_of_fp16_gradients_is_taken_in_fp32():
    grad = torch.full((4,), 5e4, dtype=torch.float16)
    (param,), scaler, optimizer = scaled(1.0, grad)
    verdict = scaler.step(optimizer, max_grad_norm=1.0)
    assert (verdict.status, float(verdict.grad_norm)) == ("applied", pytest.approx(1e5, rel=1e-3))
    assert param.tolist() == [pytest.approx(-0.5, rel=1e-3)] * 4


def test_a20_theirs_every_gradient_is_zero_without_a_word():
    (param,), _, optimizer = theirs(torch.full((4,), 5e4, dtype=torch.float16))
    nn.utils.clip_grad_norm_([param], 1.0)
    optimizer.step()
    assert param.tolist() == [0.0] * 4


# ----------------------------------------------------------------------- A21 saved in mid-iteration


def test_a21_a_scaler_saved_between_backward_and_step_is_complete():
    params, scaler, optimizer = scaled("predictive", torch.tensor([512.0]))
    for clone in (pickle.loads(pickle.dumps(scaler)), copy.deepcopy(scaler)):
        assert clone.state_dict() == scaler.state_dict()
        assert (clone._steppable, len(clone._stepped)) == (set(), 0)  # it has stepped nobody yet
    verdict = pickle.loads(pickle.dumps(scaler)).step(optimizer)
    assert (verdict.status, params[0].item()) == ("applied", -0.5)


def test_a21_a_run_saved_inside_a_window_continues_with_the_same_bits(
    make_trainer, make_batches, tmp_path, state_of, assert_same
):
    """The window's gradients, its kept buffers and its bad loss so far are part of the checkpoint."""
    batches = make_batches(9)
    batches[3] = (batches[3][0] * INF, batches[3][1])

    straight = make_trainer("fp16", gradient_accumulation_steps=3)
    straight.fit(batches)
    first = make_trainer("fp16", gradient_accumulation_steps=3)
    for _, batch in zip(range(5), first.position.batches(batches), strict=False):
        first.step(batch[1])
    first.save(tmp_path)
    second = make_trainer("fp16", gradient_accumulation_steps=3)
    second.fit(batches, resume=tmp_path)
    assert second.steps_applied == straight.steps_applied == 2
    assert_same(state_of(second), state_of(straight))


def test_a21_theirs_a_pickle_in_mid_iteration_is_an_assertion():
    _, scaler, optimizer = theirs(torch.ones(1))
    scaler.unscale_(optimizer)
    assert "unscaled" not in str(scaler.state_dict())  # saved without a word on where it stands
    with pytest.raises(AssertionError, match="at the beginning of an iteration"):
        pickle.dumps(scaler)


# ---------------------------------------------------------------------------- A22 to A24 any dtype


def test_a22_fp16_parameters_are_refused_when_the_trainer_is_built(make_model):
    model = make_model().half()
    with pytest.raises(PlanError, match=r"'body.0.weight' is stored in fp16.*Call model.float\(\) first"):
        MixedPrecisionTrainer(model, "fp16", emulate=True)
    assert {param.dtype for param in model.parameters()} == {torch.float16}
    assert type(model.head) is nn.Linear


def test_a22_theirs_it_comes_out_after_a_whole_forward_and_backward():
    _, scaler, optimizer = theirs(torch.ones(1, dtype=torch.float16))
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.step(optimizer)


def test_a23_float64_complex_and_mixed_dtypes_in_one_group():
    grads = [torch.full((2,), 8.0, dtype=dtype) for dtype in (torch.float64, torch.complex64, torch.float32)]
    params, scaler, optimizer = scaled(8.0, *grads)
    assert scaler.step(optimizer).status == "applied"
    assert [param.tolist() for param in params] == [[-1.0, -1.0]] * 3
    for position in range(3):
        params, scaler, optimizer = scaled(8.0, *grads)
        params[position].grad[1] = INF
        assert scaler.step(optimizer).status == "skipped"
        assert all(param.abs().max() == 0 for param in params)


def test_a23_the_trainer_takes_float64_by_name_and_complex_parameters(make_trainer, make_batches):
    (x, y), model = make_batches(1)[0], nn.Linear(4, 3).double()
    with pytest.raises(PlanError, match=r"stored in torch\.float64"):
        make_trainer("fp32", model=model)
    trainer = make_trainer(PrecisionPlan.of("fp64"), model=model)
    assert [trainer.step((x.double() * factor, y)).status for factor in (1.0, INF)] == ["applied", "skipped"]

    class Waves(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 3, dtype=torch.complex64))

        def forward(self, x):
            return (x.to(torch.complex64) @ self.weight).abs()

    trainer = make_trainer("bf16", model=nn.Sequential(Waves()))
    faults = FaultInjector(trainer.model).add(Fault(kind="inf", where="gradient", module="0", steps={1}))
    with faults:
        results = [trainer.step((x, y)), setattr(faults, "step", 1), trainer.step((x, y))]
    assert (results[0].status, results[2].status, results[2].first_bad_module) == (
        "applied", "skipped", "(loss function)",
    )  # fmt: skip


def test_a23_theirs_complex_gradients_fail_at_the_step():
    _, scaler, optimizer = theirs(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(NotImplementedError, match="ComplexFloat"):
        scaler.step(optimizer)


def sparse(*values):
    """An uncoalesced gradient of all its values at index 0."""
    index = torch.zeros(1, len(values), dtype=torch.long)
    return torch.sparse_coo_tensor(index, torch.tensor(values)[:, None], (2, 1), check_invariants=True)


@pytest.mark.parametrize(("values", "status"), [([3e38, 3e38], "skipped"), ([1.0, INF], "skipped"),
                                                ([8.0, 16.0], "applied")])  # fmt: skip
def test_a24_duplicates_of_a_sparse_gradient_are_summed_before_they_are_checked(values, status):
    param, scaler = nn.Parameter(torch.zeros(2, 1)), LossScaler(8.0)
    scaler.scale(torch.ones(()))
    param.grad = sparse(*values)
    assert scaler.step(torch.optim.SGD([param], lr=1.0)).status == status
    assert param.flatten().tolist() == ([-3.0, 0.0] if status == "applied" else [0.0, 0.0])


def test_a24_theirs_duplicates_that_overflow_in_fp32_are_missed():
    param = nn.Parameter(torch.zeros(2, 1))
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=1.0), torch.optim.SGD([param], lr=1.0)
    scaler.scale(torch.ones(()))
    param.grad = sparse(3e38, 3e38)
    scaler.step(optimizer)
    assert not param[0].isfinite()


def test_a24_a_bad_sparse_gradient_is_skipped_and_its_module_named(make_trainer):
    """Every row of the output's gradient is finite; the sum over the row that is looked up twice is not."""
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True))
    nn.init.zeros_(model[0].weight)
    trainer = make_trainer(
        "fp32", model=model, optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        loss_fn=lambda output, target: (output * target).sum(),
    )  # fmt: skip
    rows = torch.tensor([1, 1, 2])
    facts = trainer.step((rows, torch.tensor(3e38))).facts
    assert (facts.status, facts.loss, facts.first_bad_module) == ("skipped", 0.0, "0")
    assert trainer.step((rows, torch.tensor(1.0))).status == "applied"
    assert model[0].weight[:, 0].tolist() == pytest.approx([0.0, -0.2, -0.1, 0.0, 0.0])


# ------------------------------------------------------------- A25 devices whose overflow saturates


class SaturatingDevice:
    """A device that has infinities in no gradient: a flag says that something overflowed since it was cleared."""

    def __init__(self, monkeypatch):
        self.flag = False
        monkeypatch.setattr(backends, "clear_overflow", lambda device: setattr(self, "flag", False))
        monkeypatch.setattr(backends, "overflow_seen", lambda device: torch.tensor(self.flag))


@pytest.mark.parametrize("late", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("position", [0, 1])
def test_a25_an_overflow_that_saturates_skips_its_own_window_and_no_other(
    position, late, make_trainer, make_batches, monkeypatch, request, state_of, assert_same
):
    if late:
        request.getfixturevalue("late_verdict")
    ends = []
    for overflow in (True, False):
        device = SaturatingDevice(monkeypatch)
        trainer = make_trainer(
            "fp16", gradient_accumulation_steps=2, optimizer=lambda params: torch.optim.AdamW(params, fused=True)
        )
        batches = make_batches(8)
        culprit = batches[2 + position][0]
        trainer.model.register_forward_pre_hook(  # in the replay too, which happens inside a later window
            lambda _, args: setattr(device, "flag", device.flag or args[0] is culprit)  # noqa: B023
        )
        results = [trainer.step(batch) for i, batch in enumerate(batches) if i // 2 != 1 or overflow]
        if overflow:
            assert [r.status for r in results[1::2]] == ["applied", "skipped", "applied", "applied"]
            assert results[3].reason == "the device saw an overflow"
        ends.append(state_of(trainer))
    assert_same(*ends)


def test_a25_a_dynamic_scale_backs_off_on_the_flag(make_trainer, make_batches, monkeypatch):
    device = SaturatingDevice(monkeypatch)
    trainer = make_trainer("fp16", "dynamic")
    trainer.model.head.register_full_backward_hook(lambda *_: setattr(device, "flag", True))
    for batch in make_batches(2):
        assert trainer.step(batch).status == "skipped"
    assert trainer.scaler.get_scale() == 2.0**14


def test_a25_theirs_a_saturated_gradient_is_applied():
    (param,), scaler, optimizer = theirs(torch.tensor([65504.0]), init_scale=1.0)
    scaler.step(optimizer)
    assert param.item() == -65504.0


# ------------------------------------------------------------------- the predictive policy in a run


def skips(policy, make_trainer, batches):
    """Skipped steps of a run whose gradients grow and shrink 64-fold, and the scales it used."""
    sizes = iter([2.0 ** (6 * math.sin(i / 6)) for i in range(len(batches))])
    trainer = make_trainer(
        "fp16", policy, max_skipped_steps=100, scheduler=None, optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
        loss_fn=lambda output, target: nn.functional.cross_entropy(output.float(), target) * trainer.size,
    )  # fmt: skip
    lost = 0
    for batch, trainer.size in zip(batches, sizes, strict=True):
        lost += trainer.step(batch).status == "skipped"
    return lost


def test_predictive_overflows_rarely_where_dynamic_probes(make_trainer, make_batches):
    batches = make_batches(80)
    dynamic = skips(DynamicLossScale(interval=5), make_trainer, batches)
    predictive = skips("predictive", make_trainer, batches)
    assert predictive <= 1
    assert dynamic >= 4
