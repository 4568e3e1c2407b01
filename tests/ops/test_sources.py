"""What activations and their gradients are computed of, against autograd in float64."""

import pytest
import torch
from torch.nn import functional as F

from deepseek_mp.errors import ConfigError
from deepseek_mp.ops.sources import ACTIVATIONS, SOURCES, Source, can_make, compute, find_source

FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def drawn(count, dtype=torch.float64):
    return [torch.randn(6, 32, dtype=torch.float64).to(dtype) * 2 for _ in range(count)]


def test_every_activation_has_four_sources():
    assert set(FUNCTIONS) == set(ACTIVATIONS)
    assert len(SOURCES) == 4 * len(ACTIVATIONS)
    assert SOURCES["gelu_tanh_gate_grad"] == Source("gelu_tanh", gate=True, grad=True, inputs=3)
    assert [SOURCES["silu" + end].inputs for end in ("", "_gate", "_grad", "_gate_grad")] == [1, 2, 2, 3]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sources_are_the_activation_and_the_gradients_that_autograd_finds(activation):
    f = FUNCTIONS[activation]
    x, up, g = drawn(3)
    x.requires_grad_()
    up.requires_grad_()
    (slope,) = torch.autograd.grad(f(x), x, g)
    to_x, to_up = torch.autograd.grad(f(x) * up, (x, up), g)
    for source, inputs, expected in (
        ("", (x,), f(x)),
        ("_gate", (x, up), f(x) * up),
        ("_grad", (x, g), slope),
        ("_gate_grad", (x, up, g), to_x),
        ("_gate", (x, g), to_up),
    ):
        made = compute(activation + source, [tensor.detach() for tensor in inputs])
        torch.testing.assert_close(made, expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("source", SOURCES)
def test_nothing_is_rounded_in_between(source):
    inputs = drawn(SOURCES[source].inputs, torch.bfloat16)
    made = compute(source, inputs)
    assert made.dtype == torch.float32
    exact = compute(source, [tensor.double() for tensor in inputs])
    assert exact.dtype == torch.float64
    torch.testing.assert_close(made.double(), exact, rtol=2e-5, atol=2e-6)


def test_relu_at_zero_and_at_nan():
    x, g = torch.tensor([0.0, -1.0, 2.0, float("nan")]), torch.tensor([5.0, float("inf"), 5.0, 5.0])
    assert compute("relu_grad", [x, g]).tolist() == [0, 0, 5, 5]
    value = compute("relu", [x])
    assert value[:3].tolist() == [0, 0, 2]
    assert value[3].isnan()


def test_unknown_sources_and_other_numbers_of_tensors_are_refused():
    with pytest.raises(ConfigError, match=r"source 'tanh'.*Allowed: silu, silu_grad"):
        compute("tanh", drawn(1))
    with pytest.raises(ConfigError, match="source 'silu_up'"):
        find_source("silu_up")
    with pytest.raises(ConfigError, match=r"2 tensors for the source 'relu'.*Allowed: 1"):
        compute("relu", drawn(2))


def test_the_reference_makes_everything_and_triton_what_one_pass_can():
    names = ("tensor", "row", "1x32", "1x128", "128x128", "delayed")
    assert all(can_make(name, "reference") for name in names)
    assert [name for name in names if can_make(name, "triton")] == ["1x128", "128x128", "delayed"]
    assert not can_make("1x128", "native")
