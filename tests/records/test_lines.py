"""Lines are strict JSON, and what is not finite stays visible in them."""

from __future__ import annotations

import json
import math
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepseek_mp.errors import ConfigError
from deepseek_mp.precision import FORMATS, Decision, Reason
from deepseek_mp.records.lines import NON_FINITE, decode, encode

TEXT = st.text().filter(lambda text: text not in NON_FINITE)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(TEXT, VALUES, max_size=5))
def test_fields_come_back(fields: dict[str, Any]) -> None:
    line = encode(fields, "metrics")
    assert "\n" not in line
    assert decode(line) == fields


@pytest.mark.parametrize(("value", "word"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")])
def test_what_is_not_finite_is_a_word_in_the_file_and_a_number_when_read(value: float, word: str) -> None:
    line = encode({"loss": value, "deep": [{"x": value}]}, "metrics")
    assert json.loads(line) == {"loss": word, "deep": [{"x": word}]}
    found = decode(line)
    assert found is not None
    assert str(found["loss"]) == str(found["deep"][0]["x"]) == str(value)


def test_no_line_holds_a_constant_that_json_does_not_know() -> None:
    line = encode({"loss": math.nan, "tensor": torch.tensor(math.inf), "numpy": np.float32(math.nan)}, "metrics")

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert json.loads(line, parse_constant=refuse) == {"loss": "NaN", "tensor": "Infinity", "numpy": "NaN"}


class Colour(StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (torch.tensor(2.5), 2.5),
        (torch.tensor(3), 3),
        (torch.tensor(True), True),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (np.int64(4), 4),
        (np.bool_(True), True),
        (np.array(1.5), 1.5),
        (Colour.RED, "red"),
        ({Colour.RED: 1, 2: 3}, {"red": 1, "2": 3}),
        (Path("a/b"), "a/b"),
        ((1, 2), [1, 2]),
        (frozenset({1}), [1]),
        (Decision(layer="a", old="fp32", new="bf16", reason=Reason.PINNED, evidence={"ms": 1.5}), None),
    ],
    ids=repr,
)
def test_values_near_json_are_taken(value: object, plain: object) -> None:
    found = json.loads(encode({"x": value}, "metrics"))["x"]
    if plain is not None:
        assert found == plain
        assert type(found) is type(plain)
    else:
        assert found["reason"] == "pinned"
        assert found["evidence"] == {"ms": 1.5}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hook": print}, r"metrics\.hook is a builtin_function_or_method"),
        ({"a": {"b": [1, torch.ones(2)]}}, r"metrics\.a\.b\[1\] is a Tensor"),
        ({"a": np.ones(3)}, r"metrics\.a is a ndarray"),
        ({"a": b"x"}, r"metrics\.a is a bytes"),
        ({"a": FORMATS["fp32"]}, r"metrics\.a is a Format"),
        ({"a": 1j}, r"metrics\.a is a complex"),
    ],
)
def test_other_values_are_refused_by_their_key_path(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        encode(fields, "metrics")


@pytest.mark.parametrize(
    "line",
    [b"", b"{", b'{"a": 1', b'{"loss": NaN}', b'{"a": Infinity}', b"3", b"[1]", b"\0\0\0", b"\xff", b"[" * 99_999],
)
def test_anything_but_a_whole_object_is_none(line: bytes) -> None:
    assert decode(line) is None
