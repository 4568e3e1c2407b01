"""State that is not tensors comes back equal, types included, or is refused by its key path."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from enum import StrEnum
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from deepseek_mp.errors import CheckpointError
from deepseek_mp.trainer.state_file import decode_state, encode_state

KEYS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.just("$float")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(st.sampled_from(["$float", "$tuple", "$dict", "$counter", "a"]), inner, max_size=2)
    ),
    max_leaves=12,
)


def there_and_back(state: dict[str, Any]) -> dict[str, Any]:
    return decode_state(encode_state(state))


def assert_same(found: Any, expected: Any) -> None:
    """Equal in value and in type at every level; True is not 1 and a tuple is not a list."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        assert [type(key) for key in found] == [type(key) for key in expected]
        for key, item in expected.items():
            assert_same(found[key], item)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert (found, math.copysign(1, found)) == (expected, math.copysign(1, expected))
    else:
        assert found == expected


@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_any_tree_of_plain_values_comes_back(state: dict[str, Any]) -> None:
    assert_same(there_and_back(state), state)


@given(st.dictionaries(st.text(), VALUES, max_size=4))
def test_it_is_strict_json(state: dict[str, Any]) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads(encode_state(state), parse_constant=refuse)


def test_values_that_json_has_no_form_for() -> None:
    state = {"best": math.inf, "worst": -math.inf, "betas": (0.9, 0.999), "milestones": Counter({30: 1, 60: 2})}
    assert_same(there_and_back(state), state)
    assert math.isnan(there_and_back({"x": math.nan})["x"])


def test_what_looks_like_a_tag_is_not_taken_for_one() -> None:
    state = {"$float": "inf"}
    assert_same(there_and_back({"x": state} | state), {"x": state} | state)
    assert_same(there_and_back(state), state)


def test_subclasses_of_plain_types_become_plain() -> None:
    class Colour(StrEnum):
        RED = "red"

    found = there_and_back({"a": np.float64(0.5), "b": Colour.RED, "c": OrderedDict(x=1), Colour.RED: 2})
    assert_same(found, {"a": 0.5, "b": "red", "c": {"x": 1}, "red": 2})


def cyclic() -> dict[str, Any]:
    state: dict[str, Any] = {}
    state["self"] = state
    return state


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"scheduler": {"lr_lambdas": [None, lambda step: 0.5]}}, r"state\.scheduler\.lr_lambdas\[1\] is a .*function"),
        ({"metrics": {"loss": np.float32(1.0)}}, r"state\.metrics\.loss is a numpy\.float32"),
        ({"seen": np.arange(3)}, r"state\.seen is a numpy\.ndarray"),
        ({"step": torch.tensor(3)}, r"state\.step is a torch\.Tensor.*among the snapshot's tensors"),
        ({"ids": {1, 2}}, r"state\.ids is a builtins\.set"),
        ({"raw": b"x"}, r"state\.raw is a builtins\.bytes"),
        ({"device": torch.device("cpu")}, r"state\.device is a torch\.device"),
        ({"map": {torch.float32: 1}}, r"state\.map key torch\.float32 is a torch\.dtype"),
        (cyclic(), "nested too deeply, or contains itself"),
    ],
)
def test_anything_else_is_refused_by_its_key_path(state: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        encode_state(state)


@pytest.mark.parametrize("data", [b"[]", b"3", b'{"a": {"$tuple": 3}}', b'{"$dict": [[1]]}', b'{"$float": "x"}', b"{"])
def test_other_data_is_refused(data: bytes) -> None:
    with pytest.raises((ValueError, TypeError), match=r".+"):
        decode_state(data)


SCHEDULERS = {
    "step": lambda o: lr_scheduler.StepLR(o, 3),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [2, 5, 5]),
    "constant": lambda o: lr_scheduler.ConstantLR(o),
    "linear": lambda o: lr_scheduler.LinearLR(o),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=2), lr_scheduler.MultiStepLR(o, [3])], [2]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o), lr_scheduler.StepLR(o, 2)]),
}


def make(name: str) -> tuple[torch.optim.Optimizer, lr_scheduler.LRScheduler]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1, momentum=0.9)
    return optimizer, SCHEDULERS[name](optimizer)


def rates(optimizer: torch.optim.Optimizer, scheduler: lr_scheduler.LRScheduler, steps: int) -> list[float]:
    out = []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        out.append(optimizer.param_groups[0]["lr"])
    return out


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_of_torch_goes_on_as_if_never_stopped(name: str) -> None:
    optimizer, scheduler = make(name)
    rates(optimizer, scheduler, 4)
    state = there_and_back({"scheduler": scheduler.state_dict(), "group": _group(optimizer)})
    expected = rates(optimizer, scheduler, 8)

    optimizer, scheduler = make(name)
    scheduler.load_state_dict(state["scheduler"])
    optimizer.param_groups[0].update(state["group"])
    assert rates(optimizer, scheduler, 8) == expected


def _group(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}


def test_a_plateau_schedule_keeps_its_infinite_best() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    assert there_and_back(scheduler.state_dict())["best"] == math.inf
