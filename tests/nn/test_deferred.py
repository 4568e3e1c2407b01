"""The output of a linear layer that is computed when it is read: by whom, and what cannot be."""

from __future__ import annotations

from collections.abc import Callable
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


def test_a_function_that_is_given_it_would_lose_the_gradient() -> None:
    _, _, output = made()
    result = Twice.apply(output)
    with pytest.raises(ConfigError, match=r"went into an autograd.Function.*Train with fused_loss=False"):
        result.sum().backward()


def test_nor_can_a_full_backward_hook_stand_around_the_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 5))
    model.register_full_backward_hook(lambda module, grads, out: None)
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    with deferring(layer):
        output = model(torch.randn(2, 4, requires_grad=True))
    with pytest.raises(ConfigError, match="or through a full backward hook"):
        output.sum().backward()
