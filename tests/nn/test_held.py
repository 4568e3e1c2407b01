"""Weights quantised once for several forwards, and never used when they are stale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepseek_mp.nn import apply, functional, revert
from deepseek_mp.nn.held import HeldWeights

X = torch.randn(32, 128)


@pytest.fixture
def model() -> Iterator[nn.Module]:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 16))
    apply(made, "block", emulate=True)
    yield made
    revert(made)


@pytest.fixture
def casts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of everything that is quantised."""
    seen: list[tuple[int, ...]] = []
    original = functional.quantise

    def watched(x: Tensor, *args: Any, **options: Any) -> Any:
        seen.append(tuple(x.shape))
        return original(x, *args, **options)

    monkeypatch.setattr(functional, "quantise", watched)
    return seen


def forward(model: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(X).float().square().mean()


def gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    forward(model).backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def test_held_weights_give_the_same_numbers(model: nn.Module) -> None:
    expected = gradients(model)
    held = HeldWeights(model)
    for _ in range(2):
        with held.lent(0):
            got = gradients(model)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_weight_is_quantised_once_for_all_forwards_of_one_mark(model: nn.Module, casts: list[Any]) -> None:
    held = HeldWeights(model)
    for _ in range(3):
        with held.lent("same"):
            forward(model).backward()
    assert casts.count((256, 128)) == casts.count((128, 256)) == 1


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_weight_of_a_1x1_convolution_is_held_as_its_matrix(layout: torch.memory_format, casts: list[Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(128, 256, 1), nn.ReLU(), nn.Conv2d(256, 128, 1), nn.Conv2d(128, 128, 3))
    model, x = model.to(memory_format=layout), torch.randn(2, 128, 3, 5)
    apply(model, "block", emulate=True)

    def step() -> list[Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            model(x).float().square().mean().backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    expected = step()
    casts.clear()
    held = HeldWeights(model)
    for _ in range(3):
        with held.lent("same"):
            assert all(torch.equal(a, b) for a, b in zip(step(), expected, strict=True))
    assert casts.count((256, 128)) == casts.count((128, 256)) == 1
    assert model[3].held_weight is None


def test_a_weight_that_is_only_rounded_is_not_held() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 5, 1))
    apply(model, "tensor", emulate=True)
    with HeldWeights(model).lent(1):
        assert [unit.held_weight for unit in model] == [None, None]


def test_another_mark_or_a_drop_quantises_again(model: nn.Module) -> None:
    held = HeldWeights(model)
    with held.lent(1):
        before = forward(model)
    with torch.no_grad():
        model[0].weight.mul_(2)
    with held.lent(1):
        assert torch.equal(forward(model), before), "the mark says that nothing changed"
    with held.lent(2):
        assert not torch.equal(forward(model), before)
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    held.drop()
    with held.lent(2):
        assert torch.equal(forward(model), before)


def test_nothing_is_lent_outside(model: nn.Module) -> None:
    held = HeldWeights(model)
    with pytest.raises(RuntimeError, match="stop"), held.lent(1):
        raise RuntimeError("stop")
    assert all("held_weight" not in vars(module) for module in model.modules())
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    hidden = model[0](X)
    assert not hidden.any()


def test_a_model_without_low_precision_lends_nothing() -> None:
    plain = nn.Sequential(nn.Linear(4, 4))
    apply(plain, "bf16")
    with HeldWeights(plain).lent(1):
        assert "held_weight" not in vars(plain[0])


def test_a_weight_put_in_the_place_of_a_held_one_is_what_counts(model: nn.Module) -> None:
    with HeldWeights(model).lent(1), torch.no_grad():
        zero = {"weight": torch.zeros_like(model[0].weight), "bias": torch.zeros_like(model[0].bias)}
        assert not torch.func.functional_call(model[0], zero, (X,)).any()
        model[2].weight = nn.Parameter(torch.zeros_like(model[2].weight))
        model[2].bias.zero_()
        assert not model[2](torch.randn(4, 256)).any()


def test_a_weight_that_is_not_trained_is_not_held(model: nn.Module) -> None:
    """As a momentum encoder's, which a model writes in its forward."""
    model[0].weight.requires_grad_(False)
    with HeldWeights(model).lent(1):
        assert model[0].held_weight is None
        assert model[2].held_weight is not None
        model[0].weight.data.zero_()
        model[0].bias.data.zero_()
        assert not model[0](X).any()
