"""Example inputs as the arguments of a call: a tuple is positional, a mapping by name, a list one argument."""

import torch

from deepseek_mp.inference.arguments import arguments_of, shapes_of


def test_what_inputs_stand_for():
    x, y = torch.randn(2, 3), torch.randn(4)
    assert arguments_of(x) == ((x,), {})
    assert arguments_of((x, y)) == ((x, y), {})
    assert arguments_of([x, y]) == (([x, y],), {})
    assert arguments_of({"x": x}) == ((), {"x": x})


def test_shapes_are_those_of_all_tensors_whatever_the_order_of_names():
    x, y = torch.randn(2, 3), torch.tensor(1)
    assert shapes_of(([x, 1], {"y": y}), {}) == ((2, 3), ())
    assert shapes_of((x,), {"b": x, "a": y}) == shapes_of((x,), {"a": y, "b": x}) == ((2, 3), (), (2, 3))
    assert shapes_of((), {}) == ()
