"""Naming the custom Function behind an error about formats, and no other error."""

from __future__ import annotations

import pytest
import torch

from deepseek_mp.errors import ConfigError
from deepseek_mp.trainer.functions import mixed_formats


class Product(torch.autograd.Function):
    """Multiplies as it is told to in forward, and by an FP32 weight in backward."""

    @staticmethod
    def forward(context, inputs, weight):
        context.save_for_backward(weight)
        return inputs @ weight.to(inputs.dtype)

    @staticmethod
    def backward(context, gradient):
        (weight,) = context.saved_tensors
        return gradient @ weight.t(), None


class InForward(torch.autograd.Function):
    @staticmethod
    def forward(context, inputs, weight):
        return inputs @ weight

    @staticmethod
    def backward(context, gradient):
        return gradient, None


class Aware(Product):
    forward = staticmethod(torch.amp.custom_fwd(Product.forward, device_type="cpu"))


class Outer:
    class Nested(Product):
        """Named with the class around it."""


def error_of(function):
    """The RuntimeError of a forward and backward of the function with bf16 inputs and an FP32 weight."""
    inputs = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
    try:
        function.apply(inputs, torch.ones(2, 2)).sum().backward()
    except RuntimeError as error:
        return error
    raise AssertionError("it did not fail")


@pytest.mark.parametrize(
    ("function", "name"), [(Product, "Product"), (InForward, "InForward"), (Outer.Nested, r"Outer\.Nested")]
)
def test_the_function_is_named_with_what_it_met_and_what_to_do(function, name):
    named = mixed_formats(error_of(function))
    assert isinstance(named, ConfigError)
    with pytest.raises(ConfigError, match=rf"autograd\.Function {name} .*BFloat16.*Allowed.*custom_fwd.*custom_bwd"):
        raise named


def test_a_function_that_was_decorated_is_not_to_blame():
    assert mixed_formats(error_of(Aware)) is None


def test_an_error_outside_a_function_is_not_named():
    with pytest.raises(RuntimeError, match="dtype") as caught:
        torch.ones(2, 2) @ torch.ones(2, 2, dtype=torch.bfloat16)
    assert mixed_formats(caught.value) is None


def test_another_error_inside_a_function_is_not_named():
    class Broken(Product):
        @staticmethod
        def backward(context, gradient):
            raise RuntimeError("out of luck")

    assert mixed_formats(error_of(Broken)) is None


def test_an_error_without_a_traceback_is_not_named():
    assert mixed_formats(RuntimeError("expected scalar type Float")) is None
