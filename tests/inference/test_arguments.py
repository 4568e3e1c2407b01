"""Example inputs as the arguments of a call: a tuple is positional, a mapping by name, a list one argument."""

import torch

from deepseek_mp.inference.arguments import arguments_of, clones, shapes_of, undoing


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


def test_copies_share_nothing():
    state = torch.zeros(2)
    made = clones({"state": (state, "text")})
    state.add_(1)
    assert made["state"][0].tolist() == [0, 0]
    assert made["state"][1] == "text"


def test_what_is_written_to_inputs_can_be_undone_again_and_again():
    x, wide = torch.zeros(2), torch.ones(1).expand(3)
    undo = undoing({"x": (x, wide, 1)})
    for _ in range(2):
        x.add_(1)
        undo()
        assert x.tolist() == [0, 0]
    with torch.inference_mode():
        kept = torch.ones(2)
    undoing(kept)()
