"""The output of a linear layer that is computed when it is read: by whom, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from own_function import Twice
from torch import Tensor, nn
from torch.nn import functional as F

from deepseek_mp.errors import ConfigError
from deepseek_mp.nn.deferred import Deferred, deferring, is_pending


def made() -> tuple[nn.Linear, Tensor, Deferred]:
    layer, hidden = nn.Linear(4, 5), torch.randn(2, 3, 4, requires_grad=True)
    with deferring(layer):
        output = layer(hidden)
    assert isinstance(output, Deferred)
    return layer, hidden, output


def test_what_it_looks_like_is_known_without_computing_it() -> None:
    _, _, output = made()
    assert (output.shape, output.dtype, output.device.type) == ((2, 3, 5), torch.float32, "cpu")
    assert (output.dim(), output.ndim, len(output), output.size(-1), output.numel()) == (3, 3, 2, 5, 30)
    assert output.is_floating_point()
    assert output.requires_grad
    assert isinstance(output, Tensor)
    assert is_pending(output)


READERS: list[Callable[[Any], Any]] = [
    lambda y: y + 1,
    lambda y: 1 - y,
    lambda y: F.cross_entropy(y.flatten(0, 1), torch.zeros(6, dtype=torch.long)),
    lambda y: torch.stack([y, y]),
    lambda y: y[0, 1:],
    lambda y: torch.einsum("bth->bt", y),
    lambda y: y.T if y.dim() == 2 else y.mT,
    lambda y: F.scaled_dot_product_attention(y, y, y),
]


@pytest.mark.parametrize("read", READERS)
def test_who_reads_it_sees_the_output_and_its_graph(read: Callable[[Any], Any]) -> None:
    layer, hidden, output = made()
    leaves = [hidden, *layer.parameters()]
    got, want = read(output), read(layer(hidden))
    assert type(got) is Tensor
    assert not is_pending(output)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(value.square().sum(), leaves) for value in (got, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("ask", [repr, Tensor.tolist, Tensor.data_ptr, Tensor.detach, lambda y: y.grad_fn])
def test_what_else_needs_values(ask: Callable[[Any], Any]) -> None:
    _, _, output = made()
    assert ask(output) is not None
    assert not is_pending(output)


def test_it_is_computed_once_and_may_be_written_to() -> None:
    layer, hidden, output = made()
    want = layer(hidden) * 2
    output.mul_(2)
    torch.testing.assert_close(output + 0, want)


def test_it_has_a_graph_whatever_mode_it_is_read_in() -> None:
    layer, _, output = made()
    with torch.no_grad():
        output + 1
    (output * 1).sum().backward()
    assert layer.weight.grad is not None


def test_a_tensor_hook_is_called() -> None:
    _, _, output = made()
    seen: list[Tensor] = []
    output.register_hook(seen.append)
    output.sum().backward()
    assert [grad.shape for grad in seen] == [(2, 3, 5)]


@pytest.mark.parametrize("enabled", [True, False])
def test_it_is_computed_in_the_region_that_the_layer_was_called_in(enabled: bool) -> None:
    layer, hidden = nn.Linear(4, 5), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled), deferring(layer):
        output, want = layer(hidden), F.linear(hidden, layer.weight, layer.bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=not enabled):
        assert output.dtype == want.dtype == (output + 0).dtype
        assert torch.equal(output, want)


def test_without_gradients_and_outside_the_layer_computes() -> None:
    layer, hidden, _ = made()
    with torch.no_grad(), deferring(layer):
        assert type(layer(hidden)) is Tensor
    assert type(layer(hidden)) is Tensor
    with pytest.raises(RuntimeError, match="stop"), deferring(layer):
        raise RuntimeError("stop")
    assert "forward" not in vars(layer)


def test_a_forward_of_the_layer_s_own_stays() -> None:
    layer, hidden, _ = made()
    layer.forward = own = lambda x: 2 * F.linear(x, layer.weight)  # type: ignore[method-assign]
    with deferring(layer):
        assert type(layer(hidden)) is Tensor
    assert layer.forward is own


def test_a_deferred_input_is_computed() -> None:
    layer = nn.Linear(4, 4)
    hidden = torch.randn(2, 4)
    with deferring(layer):
        twice = layer(layer(hidden))
    torch.testing.assert_close(twice, layer(layer(hidden)))


@pytest.mark.parametrize("what", ["hidden", "weight", "bias"])
def test_what_was_changed_since_is_an_error(what: str) -> None:
    layer, hidden = nn.Linear(4, 5), torch.randn(2, 4)
    with deferring(layer):
        output = layer(hidden)
    with torch.no_grad():
        (hidden if what == "hidden" else getattr(layer, what)).zero_()
    with pytest.raises(ConfigError, match="the last layer's input or weight was changed in place after that layer"):
        output + 1


@pytest.mark.parametrize("read", [lambda y: y + 0, Twice.apply])
def test_weights_that_the_layer_was_lent_for_the_call_are_those_that_it_has(read: Callable[[Any], Any]) -> None:
    layer, hidden, _ = made()
    lent = {name: (2 * value).detach().requires_grad_() for name, value in layer.named_parameters()}
    found = []
    for put_off in (True, False):
        with deferring(layer) if put_off else nullcontext():
            output = torch.func.functional_call(layer, lent, (hidden,))
        result = read(output)
        found.append([result.detach(), *torch.autograd.grad(result.square().sum(), [hidden, *lent.values()])])
    torch.testing.assert_close(*found)


class Own(torch.autograd.Function):
    """Keeps what it is given, and gives its square."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Same(torch.autograd.Function):
    """Gives the very tensor that it is given, and its gradient three times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


class Writes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("frozen", [(), ("weight",), ("weight", "bias")])
@pytest.mark.parametrize("function", [Twice, Own, Same])
def test_a_function_that_is_given_it_gets_its_values_and_gives_its_gradient(
    function: Any, frozen: tuple[str, ...], narrow: bool
) -> None:
    layer, hidden, _ = made()
    for name in frozen:
        getattr(layer, name).requires_grad_(False)
    leaves = [leaf for leaf in (hidden, *layer.parameters()) if leaf.requires_grad]
    found = []
    for put_off in (True, False):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=narrow),
            deferring(layer) if put_off else nullcontext(),
        ):
            output = layer(hidden)
        result = function.apply(output)
        found.append([result.detach(), *torch.autograd.grad(result.float().square().sum(), leaves)])
    torch.testing.assert_close(*found)


def test_a_function_and_another_reader() -> None:
    layer, hidden, output = made()
    leaves = [hidden, *layer.parameters()]
    plain = layer(hidden)
    found = [torch.autograd.grad((Twice.apply(y) + y.square()).sum(), leaves) for y in (output, plain)]
    torch.testing.assert_close(*found)


def test_an_operation_that_is_handed_it_past_python_s_functions() -> None:
    layer, hidden, output = made()
    with torch._C.DisableTorchFunctionSubclass():
        got = torch.ops.aten.sin(output)
    torch.testing.assert_close(got, layer(hidden).sin())
    leaves = [hidden, *layer.parameters()]
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), leaves) for y in (got, layer(hidden).sin())))


def test_who_writes_to_it_past_python_s_functions_is_refused() -> None:
    _, _, output = made()
    with pytest.raises(ConfigError, match=r"written to inside of an autograd.Function.*fused_loss=False"):
        Writes.apply(output)


def test_a_full_backward_hook_stands_around_the_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 5))
    seen: list[Tensor] = []
    model.register_full_backward_hook(lambda module, grads, out: seen.append(out[0].clone()))
    layer, hidden = model[0], torch.randn(2, 4, requires_grad=True)
    assert isinstance(layer, nn.Linear)
    found = []
    for put_off in (True, False):
        with deferring(layer) if put_off else nullcontext():
            output = model(hidden)
        found.append(torch.autograd.grad(output.square().sum(), [hidden, *layer.parameters()]))
    torch.testing.assert_close(*found)
    torch.testing.assert_close(*seen)
