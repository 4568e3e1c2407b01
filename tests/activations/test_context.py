from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import nn

from deepseek_mp.activations import ActivationSettings, compressed_activations
from deepseek_mp.activations.compress import rounded
from deepseek_mp.workloads.gpt import GPTConfig, byte_gpt, next_byte_loss

ALL = ActivationSettings(min_bytes=1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256))


def gradients(model, loss) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True))


def error_energy(found, exact) -> float:
    lost = sum((a - b).square().sum() for a, b in zip(found, exact, strict=True))
    return float(lost / sum(b.square().sum() for b in exact))


@pytest.mark.parametrize(("rounding", "bound"), [("nearest", 1.5e-3), ("stochastic", 3e-3)])
def test_gradients_have_the_error_of_the_format_and_outputs_none(rounding, bound):
    model = byte_gpt(GPTConfig(width=64, context=32, layers=2))
    tokens = torch.randint(256, (16, 33))
    exact = next_byte_loss(model(tokens[:, :-1]), tokens[:, 1:])
    settings = ActivationSettings(min_bytes=1, rounding=rounding)
    with compressed_activations(model, settings) as saved:
        loss = next_byte_loss(model(tokens[:, :-1]), tokens[:, 1:])
    assert torch.equal(loss, exact)
    assert 0 < error_energy(gradients(model, loss), gradients(model, exact)) < bound
    assert saved.record().by_form()["fp8"][1] < saved.record().by_form()["fp8"][0] * 0.4


def test_gradients_are_right_on_average():
    model = mlp()
    x = torch.randn(128, 256, requires_grad=True)
    exact = gradients(model, model(x).square().mean())
    draws = []
    for _ in range(40):
        with compressed_activations(model, ALL):
            loss = model(x).square().mean()
        draws.append(gradients(model, loss))
    mean = [torch.stack(column).mean(0) for column in zip(*draws, strict=True)]
    one = sum(error_energy(draw, exact) for draw in draws) / len(draws)
    assert error_energy(mean, exact) < 1.5 * one / 40


def test_forwards_draw_different_numbers_unless_they_are_numbered():
    model, x = mlp(), torch.randn(128, 256, requires_grad=True)

    def once(number):
        with compressed_activations(model, ALL, number=number):
            loss = model(x).square().mean()
        return gradients(model, loss)

    assert error_energy(once(None), once(None)) > 0
    assert error_energy(once(3), once(3)) == 0
    assert error_energy(once(3), once(4)) > 0


def test_pytorchs_random_numbers_are_left_alone():
    model, x = mlp(), torch.randn(128, 256, requires_grad=True)
    before = torch.get_rng_state()
    with compressed_activations(model, ALL):
        model(x).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_the_backward_may_run_inside_and_several_times():
    model, x = mlp(), torch.randn(128, 256, requires_grad=True)
    with compressed_activations(model, ALL):
        loss = model(x).square().mean()
        first = gradients(model, loss)
    assert error_energy(gradients(model, loss), first) == 0


def test_an_exception_in_the_forward_ends_the_region():
    model, x = mlp(), torch.randn(128, 256, requires_grad=True)

    def fail(*_):
        raise ValueError("broken")

    handle = model[4].register_forward_hook(fail)
    with pytest.raises(ValueError, match="broken"), compressed_activations(model, ALL):
        model(x)
    handle.remove()
    assert not any(module._forward_hooks for module in model.modules())
    loss = model(x).square().mean()
    exact = gradients(model, loss)
    assert error_energy(gradients(model, model(x).square().mean()), exact) == 0


def test_the_inner_of_two_regions_holds():
    model, x = mlp(), torch.randn(128, 256, requires_grad=True)
    with compressed_activations(model, ALL) as outer:
        with compressed_activations(model, ActivationSettings(min_bytes=1, keep=("*",))) as inner:
            hidden = model(x)
        model(hidden)
    assert "fp8" not in inner.record().by_form()
    assert outer.record().by_form()["fp8"][0] > 0
    assert outer.record().bytes_before == inner.record().bytes_before


def test_threads_have_regions_of_their_own():
    model, x = mlp(), torch.randn(128, 256, requires_grad=True)
    exact = gradients(model, model(x).square().mean())
    results = {}

    def work(name, settings):
        for _ in range(5):
            with compressed_activations(model, settings, number=1) as saved:
                loss = model(x).square().mean()
            results[name] = saved.record(), gradients(model, loss)

    kept = ActivationSettings(min_bytes=1 << 30)
    threads = [threading.Thread(target=work, args=pair) for pair in (("a", ALL), ("b", ALL), ("c", kept))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results["a"][0] == results["b"][0]
    assert error_energy(results["a"][1], results["b"][1]) == 0
    assert 0 < error_energy(results["a"][1], exact) < 3e-3
    assert error_energy(results["c"][1], exact) == 0


@pytest.mark.parametrize("how", ["after a backward", "without one"])
def test_memory_is_freed_without_the_garbage_collector(how, monkeypatch):
    alive = []

    def watched(*args):
        made = rounded(*args)
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr("deepseek_mp.activations.session.rounded", watched)
    model, x = mlp(), torch.randn(128, 256, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        with compressed_activations(model, ALL) as saved:
            loss = model(x).square().mean()
        assert alive
        assert all(ref() is not None for ref in alive)
        if how == "after a backward":
            loss.backward()
        else:
            del loss
        assert all(ref() is None for ref in alive)
        assert saved.record().bytes_after
    finally:
        gc.enable()


def test_a_result_that_is_kept_makes_no_cycle():
    x = torch.randn(128, 256, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        with compressed_activations(nn.Module(), ALL):
            result = x.exp()  # saved by its own node
        alive = weakref.ref(result)
        del result
        assert alive() is None
    finally:
        gc.enable()
