"""The step as a transaction, against an unscaled control model and PyTorch's scaler."""

import functools
import math

import numpy as np
import pytest
import torch

from deepseek_mp.controller import LossScaler, StaticLossScale
from deepseek_mp.errors import ConfigError, LossScaleError

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd_fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


def setup(make=OPTIMIZERS["sgd"], policy=8.0):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    return model, make(model.parameters()), LossScaler(policy)


def train_step(model, optimizer, scaler, x, **options):
    optimizer.zero_grad()
    scaler.scale(model(x).square().mean()).backward()
    return scaler.step(optimizer, **options)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("policy", ["dynamic", "predictive", "none", 8.0])
@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_equals_an_unscaled_control_with_a_skipped_step_in_between(name, policy, max_norm):
    model, optimizer, scaler = setup(OPTIMIZERS[name], policy)
    control, control_optimizer, _ = setup(OPTIMIZERS[name])
    data = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1))
    for i, x in enumerate(data):
        if i == 3:
            verdict = train_step(model, optimizer, scaler, x * float("inf"), max_grad_norm=max_norm)
            assert verdict.status == "skipped"
            continue
        verdict = train_step(model, optimizer, scaler, x, max_grad_norm=max_norm)
        assert verdict.status == "applied"
        control_optimizer.zero_grad()
        control(x).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(control.parameters(), max_norm or math.inf)
        control_optimizer.step()
        assert float(verdict.grad_norm) == pytest.approx(float(norm), rel=1e-5)
    torch.testing.assert_close(model.weight, control.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_first_step_leaves_no_optimizer_state(name):
    model, optimizer, scaler = setup(OPTIMIZERS[name])
    before = [p.clone() for p in model.parameters()]
    state = {k: len(v) for k, v in optimizer.state.items()}
    assert train_step(model, optimizer, scaler, torch.full((2, 4), float("nan"))).status == "skipped"
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert {k: len(v) for k, v in optimizer.state.items()} == state


def test_gradients_are_divided_by_the_divisor():
    model, optimizer, scaler = setup()
    reference, reference_optimizer, _ = setup()
    x = torch.randn(5, 4)
    for m, o, s in ((model, optimizer, scaler), (reference, reference_optimizer, LossScaler("none"))):
        s.scale(m(x).square().mean() * (4.0 if m is model else 1.0)).backward()
        s.step(o, divisor=torch.tensor(4.0) if m is model else None)
    torch.testing.assert_close(model.weight, reference.weight)


def test_a_bad_loss_skips_although_gradients_are_finite():
    model, optimizer, scaler = setup()
    verdict = train_step(model, optimizer, scaler, torch.ones(2, 4), nonfinite=torch.tensor(1.0))
    assert verdict.status == "skipped"


def test_before_sees_unscaled_gradients_and_may_change_them():
    model, optimizer, scaler = setup(policy=1024.0)
    seen = []

    def halve():
        seen.append(model.weight.grad.clone())
        model.weight.grad.mul_(0.5)

    x = torch.randn(5, 4)
    weight = model.weight.detach().clone()
    train_step(model, optimizer, scaler, x, before=halve)
    expected = torch.autograd.grad((x @ weight.requires_grad_().T + setup()[0].bias).square().mean(), weight)[0]
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(model.weight.detach(), weight.detach() - 0.1 * 0.5 * seen[0])


def test_predictive_measures_scaled_gradients_also_behind_a_divisor_or_hook():
    scales = []
    for options in ({}, {"divisor": torch.tensor(1.0)}, {"before": lambda: None}):
        model, optimizer, scaler = setup(policy="predictive")
        train_step(model, optimizer, scaler, torch.ones(5, 4), **options)
        scales.append(scaler.get_scale())
    assert scales[0] == scales[1] == scales[2] != 1024.0


def test_no_gradients_is_a_result_and_moves_nothing():
    _, optimizer, scaler = setup(policy="dynamic")
    scaler.scale(torch.ones(()))
    assert scaler.step(optimizer).status == "no_grads"
    assert scaler.state_dict()["good_steps"] == 0


def test_optimizers_in_one_step_are_one_group():
    a, b = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in (a, b)]
    scaler = LossScaler(4.0)
    scaler.scale(torch.ones(()))
    a.grad, b.grad = torch.tensor([float("inf")]), torch.tensor([4.0])
    assert scaler.step(*optimizers).status == "skipped"
    assert a.item() == b.item() == 1.0


def test_an_exception_in_the_optimizer_leaves_the_scaler_usable():
    model, optimizer, scaler = setup()
    handle = optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("out")))
    with pytest.raises(MemoryError, match="out"):
        train_step(model, optimizer, scaler, torch.ones(2, 4))
    handle.remove()
    assert train_step(model, optimizer, scaler, torch.ones(2, 4)).status == "applied"


@pytest.mark.parametrize("name", ["sgd_fused", "adamw_fused"])
def test_an_exception_in_a_fused_optimizer_leaves_no_scale_on_it(name):
    model, optimizer, scaler = setup(OPTIMIZERS[name])
    optimizer.register_step_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError("out")))
    with pytest.raises(MemoryError, match="out"):
        train_step(model, optimizer, scaler, torch.ones(2, 4))
    assert not hasattr(optimizer, "grad_scale")


def test_stepping_twice_or_without_scaling_says_what_to_do():
    model, optimizer, scaler = setup(policy="dynamic")
    with pytest.raises(LossScaleError, match=r"scaler.scale\(loss\).backward\(\)"):
        scaler.step(optimizer)
    train_step(model, optimizer, scaler, torch.ones(2, 4))
    with pytest.raises(LossScaleError, match=r"scaler.scale\(loss\).backward\(\)"):
        scaler.step(optimizer)


def test_closures_are_refused_in_every_spelling():
    model, optimizer, scaler = setup()
    scaler.scale(model(torch.ones(2, 4)).sum()).backward()
    with pytest.raises(ConfigError, match="Closures are not supported"):
        scaler.step(optimizer, lambda: torch.ones(()))
    with pytest.raises(TypeError, match="closure"):
        scaler.step(optimizer, closure=lambda: torch.ones(()))
    with pytest.raises(ConfigError, match="LBFGS, whose step needs a closure"):
        scaler.step(torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_parameters_of_other_dtypes(dtype):
    param = torch.nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer, scaler = torch.optim.SGD([param], lr=0.5), LossScaler(StaticLossScale(8.0))
    scaler.scale(torch.ones(()))
    param.grad = torch.full_like(param, 8.0)
    assert scaler.step(optimizer).status == "applied"
    assert param.tolist() == [0.5, 0.5]


def test_sparse_gradients_are_unscaled():
    embedding = torch.nn.Embedding(4, 1, sparse=True)
    torch.nn.init.zeros_(embedding.weight)
    optimizer, scaler = torch.optim.SGD(embedding.parameters(), lr=1.0), LossScaler(8.0)
    scaler.scale(embedding(torch.tensor([1, 1, 2])).sum()).backward()
    scaler.step(optimizer)
    assert embedding.weight.flatten().tolist() == [0.0, -2.0, -1.0, 0.0]


@pytest.mark.parametrize("shared", ["optimizers", "twice in a group", "one optimizer twice"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("hook", [None, lambda: None])
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_gradient_that_is_applied_twice_is_unscaled_and_measured_once(shared, fused, hook):
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    make = functools.partial(torch.optim.SGD, lr=0.1, fused=fused)
    if shared == "optimizers":
        optimizers = [make([weight]), make([weight])]
    else:
        optimizers = [make([weight, weight] if shared == "twice in a group" else [weight])]
        optimizers *= 2 if shared == "one optimizer twice" else 1
    scaler = LossScaler(64.0)
    scaler.scale((3.0 * weight).sum()).backward()
    verdict = scaler.step(*optimizers, before=hook)
    assert verdict.grad_norm.item() == pytest.approx(math.sqrt(18.0))
    torch.testing.assert_close(weight.detach(), torch.tensor([1.0, 2.0]) - 2 * 3.0 * 0.1)


@pytest.mark.parametrize("limit", [0, -1.0, math.nan, "1"])
def test_a_norm_that_is_no_limit_is_refused_and_the_step_can_be_made(limit):
    model, optimizer, scaler = setup()
    before = model.weight.detach().clone()
    scaler.scale(model(torch.ones(1, model.in_features)).sum()).backward()
    with pytest.raises(ConfigError, match=f"max_grad_norm={limit!r}.*None or a number above 0"):
        scaler.step(optimizer, max_grad_norm=limit)
    assert torch.equal(model.weight, before)
    assert scaler.step(optimizer, max_grad_norm=math.inf).status == "applied"
    assert model.weight.isfinite().all()


@pytest.mark.parametrize("limit", [1, 1.0, np.float32(1), torch.tensor(1.0)])
def test_a_limit_may_be_a_number_of_any_type_or_a_tensor(limit):
    weight = torch.nn.Parameter(torch.zeros(2))
    scaler = LossScaler(8.0)
    scaler.scale((weight * torch.tensor([30.0, 40.0])).sum()).backward()
    assert scaler.step(torch.optim.SGD([weight], lr=1.0), max_grad_norm=limit).status == "applied"
    torch.testing.assert_close(weight.detach(), torch.tensor([-0.6, -0.8]))


def test_a_loss_that_is_a_number_is_refused():
    with pytest.raises(ConfigError, match=r"scale\(3\.0\).*before \.item\(\)"):
        LossScaler(8.0).scale(3.0)
