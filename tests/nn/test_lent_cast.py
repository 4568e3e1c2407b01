"""An input cast once for the layers that read it, and never used for another; when casts are not used."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn

from deepseek_mp.nn.lent_cast import Casts, InputCast, LentCast

BF16 = torch.bfloat16


@pytest.fixture
def inputs() -> InputCast:
    return InputCast(BF16)


def hidden() -> Tensor:
    return torch.randn(3, 4, requires_grad=True) * 2


def test_the_same_tensor_is_cast_once(inputs: InputCast) -> None:
    x = hidden()
    first = inputs.of(x)
    assert inputs.of(x) is first
    assert first.dtype == BF16
    assert torch.equal(first, x.to(BF16))


def test_another_tensor_is_cast_anew(inputs: InputCast) -> None:
    x = hidden()
    first = inputs.of(x)
    for other in (x.clone(), x[:], x.detach()):
        assert inputs.of(other) is not first
    assert inputs.of(x) is not first, "only the last is kept"


def test_a_change_in_place_is_seen_also_through_a_view(inputs: InputCast) -> None:
    x = hidden()
    first = inputs.of(x)
    x[0].mul_(2)
    assert torch.equal(inputs.of(x), x.to(BF16))
    assert not torch.equal(inputs.of(x), first)


def test_a_tensor_that_is_to_get_a_gradient_now_is_cast_anew(inputs: InputCast) -> None:
    x = torch.randn(3, 4)
    assert not inputs.of(x).requires_grad
    x.requires_grad_()
    inputs.of(x).sum().backward()
    assert x.grad is not None


def test_without_gradients_nothing_is_cast_or_taken(inputs: InputCast) -> None:
    x = hidden()
    with torch.no_grad():
        assert inputs.of(x) is x
    first = inputs.of(x)
    with torch.no_grad():
        assert inputs.of(x) is x
    assert first.requires_grad


@pytest.mark.parametrize(
    "x", [torch.ones(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.int64), nn.Parameter(torch.ones(2, 2))]
)
def test_what_is_no_fp32_activation_is_left_to_autocast(inputs: InputCast, x: Tensor) -> None:
    assert inputs.of(x) is x


def test_an_inference_tensor_is_left_to_autocast(inputs: InputCast) -> None:
    with torch.inference_mode():
        x = torch.ones(2, 2)
    assert inputs.of(x) is x


def test_a_cast_dies_with_its_tensor(inputs: InputCast) -> None:
    x = hidden()
    cast = weakref.ref(inputs.of(x))
    assert cast() is not None
    del x
    gc.collect()
    assert cast() is None


def test_the_death_of_an_earlier_tensor_takes_nothing(inputs: InputCast) -> None:
    x, y = hidden(), hidden()
    inputs.of(x)
    kept = inputs.of(y)
    del x
    gc.collect()
    assert inputs.of(y) is kept


def test_a_tensor_in_the_place_of_a_dead_one_is_not_taken_for_it(inputs: InputCast) -> None:
    for value in range(50):
        x = torch.full((3, 4), float(value))
        assert torch.equal(inputs.of(x), x.to(BF16))
        del x


def test_nothing_of_a_transform_stays_behind(inputs: InputCast) -> None:
    x = torch.randn(3, 4, requires_grad=True)

    def loss(scale: Tensor) -> Tensor:
        return (inputs.of(x * scale).float() + inputs.of(x).float() * scale).sum()

    for _ in range(2):
        torch.func.grad(loss)(torch.tensor(2.0))
        (inputs.of(x).float() * 2).sum().backward()
        torch.func.vmap(loss)(torch.ones(3))
        (inputs.of(x).float() * 2).sum().backward()
    assert torch.equal(x.grad, torch.full((3, 4), 8.0))


def lent_of(layer: nn.Linear) -> LentCast:
    casts = Casts()
    casts.made = [layer.weight.to(BF16), layer.bias.to(BF16)]
    casts.versions = [layer.weight._version, layer.bias._version]
    casts.values = [layer.weight.detach(), layer.bias.detach()]
    return LentCast(layer.weight, layer.bias, dtype=BF16, casts=casts, places=(0, 1), inputs=InputCast(BF16))


def test_operands_are_the_casts() -> None:
    layer, x = nn.Linear(4, 4), hidden()
    lent = lent_of(layer)
    with torch.autocast("cpu", BF16):
        operands = lent.operands(layer._parameters, x)
    assert operands is not None
    assert [tensor.dtype for tensor in operands if tensor is not None] == [BF16] * 3
    with torch.autocast("cpu", BF16):
        assert lent.operands(layer._parameters, x.to(BF16)) is not None


def test_no_operands_where_no_region_or_another_casts() -> None:
    layer = nn.Linear(4, 4)
    lent = lent_of(layer)
    assert lent.operands(layer._parameters, hidden()) is None
    assert lent.operands(layer._parameters, hidden().to(BF16)) is None, "an error, as without casts"
    with torch.autocast("cpu", torch.float16):
        assert lent.operands(layer._parameters, hidden()) is None
        assert lent.operands(layer._parameters, hidden().to(BF16)) is None


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_no_operands_of_parameters_that_were_given_other_data(name: str) -> None:
    layer = nn.Linear(4, 4)
    lent = lent_of(layer)
    with torch.autocast("cpu", BF16):
        assert lent.operands(layer._parameters, hidden()) is not None
        getattr(layer, name).data = getattr(layer, name).data * 2
        assert lent.operands(layer._parameters, hidden()) is None


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_no_operands_of_parameters_that_were_written_or_replaced(name: str) -> None:
    layer = nn.Linear(4, 4)
    lent = lent_of(layer)
    with torch.autocast("cpu", BF16):
        other = {**layer._parameters, name: nn.Parameter(torch.zeros(4))}
        assert lent.operands(other, hidden()) is None
        with torch.no_grad():
            getattr(layer, name).mul_(2)
        assert lent.operands(layer._parameters, hidden()) is None
