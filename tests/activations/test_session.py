from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from deepseek_mp.activations import ActivationSettings, compressed_activations

ALL = ActivationSettings(min_bytes=1)
NONE = nn.Module()
"""A model that holds nothing."""


def inputs(*shape: int) -> torch.Tensor:
    """Large enough for FP8 to be smaller."""
    return torch.randn(*(shape or (256, 128)), requires_grad=True)


def saved_by(call, settings=ALL, model=NONE):
    """The result of a call, and what it saved: (operation, form, reason) and the amounts."""
    with compressed_activations(model, settings) as saved:
        result = call()
    return result, {(e.operation, e.form.value, e.reason.value): e for e in saved.record().saved}


def grads(result, *tensors, seed=0):
    g = torch.randn(result.shape, generator=torch.Generator().manual_seed(seed))
    return torch.autograd.grad(result, tensors, g.to(result.dtype), retain_graph=True)


def relative(a, b) -> float:
    return float(((a - b).norm() / b.norm()) ** 2)


# ------------------------------------------------------------------------------------- left alone


def test_parameters_and_their_views_are_exact_and_not_counted():
    model = nn.Linear(128, 256)
    x = inputs()
    result, saved = saved_by(lambda: F.linear(x, model.weight[:128]), model=model)
    assert set(saved) == {("linear", "fp8", "compressed")}
    assert torch.equal(*grads(result, x), *grads(F.linear(x, model.weight[:128]), x))


def test_a_parameter_that_autocast_has_cast_is_left_alone():
    model, x = nn.Linear(128, 256), inputs()
    with torch.autocast("cpu", torch.bfloat16):
        result, saved = saved_by(lambda: model(x), model=model)
        exact = model(x)
    assert set(saved) == {("linear", "fp8", "compressed"), ("linear", "kept", "weight_cast")}
    assert saved["linear", "fp8", "compressed"].bytes_before == x.numel() * 2
    assert torch.equal(*grads(result, x), *grads(exact, x))
    assert 0 < relative(*grads(result, model.weight), *grads(exact, model.weight)) < 3e-3


def test_large_tensors_and_masks_in_an_autocast_region():
    x, w = inputs(1024, 512), inputs(64, 512)  # more than is cast at once

    def call():
        return F.linear(F.dropout(F.relu(x), 0.1).masked_fill(x > 2, 0.0), w)

    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(1)
        result, saved = saved_by(call)
        torch.manual_seed(1)
        exact = call()
        (found,) = grads(result, w)  # restored inside too
    assert {"fp8", "bits"} <= {key[1] for key in saved}
    assert 0 < relative(found, *grads(exact, w)) < 3e-3
    assert relative(*grads(result, x), *grads(exact, x)) < 3e-3


def test_small_integer_narrow_and_wide_tensors():
    _, saved = saved_by(lambda: inputs(4) * inputs(4), ActivationSettings(min_bytes=1000))
    assert set(saved) == {("mul", "kept", "small")}
    _, saved = saved_by(lambda: inputs(1000) * 2 * inputs(1000))  # FP8 would add rows and be larger
    assert set(saved) == {("mul", "kept", "small")}
    index = torch.randint(128, (256, 128))
    _, saved = saved_by(lambda: inputs().gather(1, index))
    assert ("gather", "kept", "narrow") in saved
    wide = inputs().double()
    _, saved = saved_by(lambda: wide * wide)
    assert ("mul", "kept", "wide") in saved


def test_other_devices_are_left_alone():
    _, saved = saved_by(lambda: torch.randn(256, 128, device="meta", requires_grad=True) * 2 * inputs().to("meta"))
    assert set(saved) == {("mul", "kept", "device")}


def test_what_is_not_dense_or_plain():
    class Own(torch.Tensor):
        pass

    gaps, own = inputs(256, 256)[:, ::2], inputs().as_subclass(Own)
    for x in (gaps, own, inputs(256, 1).expand(256, 128)):
        result, saved = saved_by(lambda x=x: x * 2 * x)
        assert ("mul", "kept", "layout") in saved
        assert grads(result, x)


def test_statistics_of_norms_and_losses_are_exact():
    x, target = inputs(), torch.randint(128, (256,))
    for call in (lambda: F.cross_entropy(x, target), lambda: x.log_softmax(1), lambda: x.abs() / (x.abs() + 1)):
        result, saved = saved_by(call)
        assert not any(form == "fp8" for _, form, _ in saved)
        assert torch.equal(*grads(result, x), *grads(call(), x))
    _, saved = saved_by(lambda: F.layer_norm(x, (128,)))
    assert saved["layer_norm", "kept", "no_gradient"].tensors == 2
    _, saved = saved_by(lambda: F.rms_norm(x, (128,)))
    assert ("rms_norm", "kept", "statistic") in saved


def test_functions_of_the_users_own_are_left_alone():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * ctx.saved_tensors[0].sign().abs() * 2

    _, saved = saved_by(lambda: Twice.apply(inputs() + 1))
    assert set(saved) == {("", "kept", "operation")}


def test_patterns_keep_modules():
    model = nn.Sequential(nn.Linear(128, 128), nn.Sequential(nn.Linear(128, 128)))
    x = inputs()
    with compressed_activations(model, ActivationSettings(min_bytes=1, keep=("1",))) as saved:
        model(x)
    assert {(e.module, e.form.value, e.reason.value) for e in saved.record().saved} == {
        ("0", "fp8", "compressed"),
        ("1.0", "kept", "asked"),
    }


# ------------------------------------------------------------------------------------------ exact


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("function", [F.relu, F.leaky_relu])
def test_signs_are_all_that_these_need(function, in_place):
    x = inputs()
    call = lambda: function(x + 0, inplace=in_place)  # noqa: E731
    result, saved = saved_by(call)
    assert [(key[1], key[2]) for key in saved] == [("bits", "exact")]
    assert sum(e.bytes_after for e in saved.values()) * 32 == x.nbytes
    assert torch.equal(*grads(result, x), *grads(call(), x))


def test_signs_are_those_of_one_operation():
    x = torch.where(torch.rand(256, 128) < 0.1, float("nan"), torch.randn(256, 128)).requires_grad_()
    call = lambda: F.leaky_relu(F.relu(x), 0.5)  # noqa: E731  NaN goes different ways in the two
    result, _ = saved_by(call)
    g = torch.ones_like(x)
    found, exact = (torch.autograd.grad(y, x, g)[0] for y in (result, call()))
    assert torch.equal(found, exact)


def test_masks_are_bits():
    x = inputs()
    for call in (lambda: torch.where(x > 0, x, 0.5 * x), lambda: x.masked_fill(x > 0, 1.0)):
        result, saved = saved_by(call)
        assert "bits" in {key[1] for key in saved}
        assert torch.equal(*grads(result, x), *grads(call(), x))


def test_dropout_is_exact():
    x = inputs()
    torch.manual_seed(3)
    result, saved = saved_by(lambda: F.dropout(x, 0.3))
    torch.manual_seed(3)
    exact = F.dropout(x, 0.3)
    assert ("dropout", "bits", "exact") in saved
    assert torch.equal(*grads(result, x), *grads(exact, x))


# ----------------------------------------------------------------------------------------- shared


def test_a_tensor_saved_twice_is_stored_once():
    x, a, b = inputs() + 0, inputs(64, 128), inputs(64, 128)
    result, saved = saved_by(lambda: F.linear(x, a) + F.linear(x, b))
    assert saved["linear", "shared", "saved_before"].tensors == 1
    exact = F.linear(x, a) + F.linear(x, b)
    first, second = grads(result, a, b)
    assert torch.equal(first, second)
    assert relative(first, grads(exact, a)[0]) < 3e-3


def test_bytes_count_once_where_a_tensor_is_held_in_two_forms():
    x, w = inputs(), inputs(64, 128)
    _, saved = saved_by(lambda: F.linear(F.relu(x), w))
    assert saved["relu", "bits", "exact"].bytes_before == x.nbytes
    assert saved["linear", "fp8", "compressed"].tensors == 2
    assert saved["linear", "fp8", "compressed"].bytes_before == w.nbytes


def test_views_of_one_storage_are_different_tensors():
    x = inputs(2, 256, 128) + 0
    result, _ = saved_by(lambda: x[0] * x[1])
    assert relative(*grads(result, x), *grads(x[0] * x[1], x)) < 3e-3


# --------------------------------------------------------------------------------------- in place


def test_a_compressed_tensor_may_be_written_to_afterwards():
    x, w = inputs(), inputs(64, 128)
    exact = grads(F.linear(x + 0, w), w)

    def call():
        y = x + 0
        first = F.linear(y, w)
        y.mul_(100)
        return first

    result, _ = saved_by(call)
    assert relative(*grads(result, w), *exact) < 3e-3


def test_values_before_and_after_are_different_tensors():
    x, w = inputs(), inputs(64, 128)

    def call():
        y = x + 0
        first = F.linear(y, w)
        y.add_(100)
        return torch.cat([first, F.linear(y, w)])

    result, saved = saved_by(call)
    assert saved["linear", "fp8", "compressed"].tensors == 3  # the weight is shared
    with torch.no_grad():
        y = x + 0
    parts = torch.cat([F.linear(y, w), F.linear(y + 100, w)])
    assert relative(*grads(result, w), *grads(parts, w)) < 3e-3


def test_a_view_that_is_written_to():
    x = inputs(256, 256)

    def call():
        base = x * 1
        part = base[:, :128]
        F.relu(part, inplace=True)
        return base * 3

    exact = call()
    result, _ = saved_by(call)
    assert torch.equal(result, exact)
    assert torch.equal(*grads(result, x), *grads(exact, x))


def test_what_was_left_alone_raises_pytorchs_error():
    x = inputs()

    def call():
        y = x.exp()
        return y.mul_(2)

    for result in (call(), saved_by(call)[0]):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.sum().backward()


def test_a_parameter_that_was_updated_before_the_backward_is_refused():
    model, x = nn.Linear(128, 64), inputs()
    result, _ = saved_by(lambda: model(x), model=model)
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


# ------------------------------------------------------------------------ other parts of autograd


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_regions_are_exact(reentrant):
    model, x = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 128)), inputs()

    def call():
        return checkpoint(model, x * 1, use_reentrant=reentrant)

    result, saved = saved_by(call, model=model)
    exact = call()
    gradients = []
    for found in (result, exact):
        model.zero_grad()
        x.grad = None
        found.square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert ("", "kept", "operation") in saved


def test_a_backward_inside_the_region_runs_checkpointed_regions_again():
    model, x = nn.Sequential(nn.Linear(128, 128), nn.GELU()), inputs()
    for reentrant in (False, True):
        model.zero_grad()
        with compressed_activations(model, ALL):
            checkpoint(model, x * 1, use_reentrant=reentrant).sum().backward()
        found = model[0].weight.grad.clone()
        model.zero_grad()
        model(x * 1).sum().backward()
        assert relative(found, model[0].weight.grad) < 3e-3


def test_a_second_derivative_has_the_error_of_the_format():
    x, w = inputs(), inputs(64, 128)

    def penalty(y):
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), (x, w))

    result, _ = saved_by(lambda: F.linear(F.gelu(x), w))
    for found, exact in zip(penalty(result), penalty(F.linear(F.gelu(x), w)), strict=True):
        assert 0 < relative(found, exact) < 1e-2


def test_a_second_derivative_taken_inside_the_region():
    x, w = inputs(), inputs(64, 128)
    with compressed_activations(NONE, ALL):
        (g,) = torch.autograd.grad(F.linear(F.gelu(x), w).square().sum(), x, create_graph=True)
        (found,) = torch.autograd.grad(g.square().sum(), w)
    (g,) = torch.autograd.grad(F.linear(F.gelu(x), w).square().sum(), x, create_graph=True)
    assert relative(found, *torch.autograd.grad(g.square().sum(), w)) < 1e-2


def test_compiled_code_is_left_alone_and_not_compiled_again():
    model = nn.Sequential(nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 64))
    counter = CompileCounterWithBackend("aot_eager")
    compiled, x = torch.compile(model, backend=counter), inputs()
    exact = grads(model(x), *model.parameters())
    for _ in range(2):
        for owner in (model, compiled):
            result, saved = saved_by(lambda: compiled(x), model=owner)
            assert {(form, reason) for _, form, reason in saved} <= {("kept", "operation"), ("kept", "no_gradient")}
            assert all(torch.equal(a, b) for a, b in zip(grads(result, *model.parameters()), exact, strict=True))
    assert counter.frame_count == 1
