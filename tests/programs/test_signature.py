"""What a program may be called with, and what is said of everything else."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch

from deepseek_mp.errors import BatchError
from deepseek_mp.programs.signature import Leaf, Signature, inputs, path_shown, plain

SIGNATURE = Signature(
    leaves=(
        Leaf(where="['args'][0]", dtype="float32", shape=("s0", 3)),
        Leaf(where="['kwargs']['mask']", dtype="bool", shape=("s0",)),
        Leaf(where="['kwargs']['steps']", value=2),
    ),
    ranges={"s0": (2, 8)},
    conditions=("t0_0 % 2 == 0",),
)


def call(count=4, *, masks=None, width=3, dtype=torch.float32, steps=2):
    args = (torch.zeros(count, width, dtype=dtype),)
    return args, {"steps": steps, "mask": torch.ones(count if masks is None else masks, dtype=torch.bool)}


def test_it_takes_what_fits():
    for count in (2, 4, 8):
        SIGNATURE.check(*call(count))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (call(10), r"input args\[0\], float32 \[10, 3\]\. Allowed: .*float32 \[s0, 3\].* s0 from 2 to 8"),
        (call(4, width=2), r"float32 \[4, 2\]\. Allowed"),
        (call(4, masks=2), r"input kwargs\['mask'\], bool \[2\]"),
        (call(dtype=torch.float64), r"float64 \[4, 3\]"),
        (call(3), r"which are not as .*shape\[0\] % 2 == 0"),
        (call(steps=3), r"input kwargs\['steps'\], 3\. Allowed: .*= 2, which is part of the graph"),
        (call(steps=2.0), r"\['steps'\], 2\.0"),
        (call(steps=memoryview(b"2\n")), r"\['steps'\], a memoryview\. Allowed"),
        (((), {}), "inputs of no kind"),
        (((torch.zeros(4, 3),), {}), r"inputs args\[0\]\. Allowed"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_is_allowed(given, match):
    with pytest.raises(BatchError, match=match):
        SIGNATURE.check(*given)


@pytest.mark.parametrize("value", [2, 2.0, float("nan"), None, "mean", True])
def test_a_value_is_of_the_same_type_and_may_be_nan(value):
    leaf = Leaf(where="['scale']", value=value)
    assert leaf.is_value(value)
    assert not any(leaf.is_value(other) for other in (1, 1.0, 3.0, "sum", False, torch.tensor(2.0)))


def test_a_fixed_size_says_why():
    fixed = Signature(
        leaves=(Leaf(where="['args'][0]", dtype="float32", shape=(4,)),), ranges={}, fixed_because="It asks."
    )
    assert not fixed.is_free
    with pytest.raises(BatchError, match=r"other example inputs\. It asks\.$"):
        fixed.check((torch.zeros(3),), {})


def test_json_holds_all_of_it():
    assert Signature.from_json(SIGNATURE.to_json()) == SIGNATURE
    assert SIGNATURE.with_least(1).ranges == {"s0": (1, 8)}


def test_containers_become_plain_and_named_ones_are_in_order():
    pair = namedtuple("pair", "x y")
    assert plain([pair(1, {"b": 2, "a": 3})]) == [(1, {"b": 2, "a": 3})]
    assert type(plain(pair(1, 2))) is tuple
    args, kwargs = inputs(({"b": 1, "a": 2},), {"z": 1, "y": [{"d": 1, "c": 2}]})
    assert list(args[0]) == ["a", "b"]
    assert list(kwargs) == ["y", "z"]
    assert list(kwargs["y"][0]) == ["c", "d"]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ranges": [1]}, "a list as ranges"),
        ({"ranges": {"s0": ["a", None]}}, "a range from 'a' to None"),
        ({"ranges": {"s0": [1, True]}}, "a range from 1 to True"),
        ({"ranges": {}}, "an input with the size 's0'"),
        ({"leaves": [{"where": "x", "dtype": "float32", "shape": [[1]]}]}, r"an input with the size \[1\]"),
        ({"leaves": [{"where": "x", "dtype": 3, "shape": []}]}, "an input of the dtype 3"),
        ({"leaves": [{"where": None, "value": 1}]}, "an input at None"),
    ],
)
def test_what_no_signature_says_is_refused_when_it_is_read(change, match):
    with pytest.raises((TypeError, ValueError), match=match):
        Signature.from_json({**SIGNATURE.to_json(), **change})


@pytest.mark.parametrize("condition", ["__import__('os')", "t0_9 > 1", "s0 > 1"])
def test_conditions_that_are_none_are_refused_when_they_are_read(condition):
    with pytest.raises(ValueError, match="a condition with"):
        Signature.from_json({**SIGNATURE.to_json(), "conditions": [condition]})


@pytest.mark.parametrize(
    ("path", "shown"),
    [("['x']", "x"), ("['pair']['a'][0]", "pair['a'][0]"), ("['pair'].first['b']", "pair.first['b']"), ("x", "x")],
)
def test_a_path_is_shown_as_it_is_written_in_python(path, shown):
    assert path_shown(path) == shown
