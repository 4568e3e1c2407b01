"""Evidence holds JSON values only, and cannot be changed."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections.abc import Callable
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_mp.errors import PlanError
from deepseek_mp.precision.evidence import MAX_DEPTH, FrozenDict, freeze, thaw

quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=5
)
SAMPLE = {"bf16_ms": 1.5, "runs": [1, 2, {"device": "cpu"}], "cold": True, "peak": None}


@quick
@given(evidence=st.dictionaries(st.text(), json_values, max_size=3))
def test_what_goes_in_comes_out_of_json(evidence: dict[str, Any]) -> None:
    frozen = freeze(evidence)
    assert thaw(frozen) == evidence == json.loads(json.dumps(frozen, allow_nan=False))
    assert freeze(thaw(frozen)) == freeze(frozen) == frozen


def test_evidence_is_a_copy() -> None:
    source: dict[str, Any] = {"runs": [1, 2], "inner": {"a": 1}}
    frozen = freeze(source)
    source["runs"].append(3)
    source["inner"]["a"] = 2
    assert thaw(frozen) == {"runs": [1, 2], "inner": {"a": 1}}
    assert thaw(freeze(MappingProxyType({"a": (1, 2)}))) == {"a": [1, 2]}


CHANGES: dict[str, Callable[[Any], object]] = {
    "setitem": lambda e: e.__setitem__("new", 1),
    "delitem": lambda e: e.__delitem__("device"),
    "ior": lambda e: e.__ior__({"new": 1}),
    "clear": lambda e: e.clear(),
    "pop": lambda e: e.pop("device"),
    "popitem": lambda e: e.popitem(),
    "setdefault": lambda e: e.setdefault("new", 1),
    "update": lambda e: e.update(new=1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_way_to_change_it(change: str) -> None:
    frozen = freeze(SAMPLE)
    for part in (frozen, frozen["runs"][2]):
        with pytest.raises(TypeError, match="evidence is read-only"):
            CHANGES[change](part)
    assert thaw(frozen) == SAMPLE
    assert isinstance(frozen["runs"], tuple)


@pytest.mark.parametrize("renew", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies_are_equal_and_still_frozen(renew: Callable[[FrozenDict], FrozenDict]) -> None:
    again = renew(freeze(SAMPLE))
    assert again == freeze(SAMPLE)
    with pytest.raises(TypeError, match="read-only"):
        again["runs"][2]["device"] = "cuda"


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (math.nan, r"evidence\['k'\] is nan \(float\)"),
        (math.inf, r"evidence\['k'\] is inf \(float\)"),
        (object(), r"evidence\['k'\] is <object.*\(object\)"),
        ({1, 2}, r"evidence\['k'\] is \{1, 2\} \(set\)"),
        (b"x", r"evidence\['k'\] is b'x' \(bytes\)"),
        (1j, r"evidence\['k'\] is 1j \(complex\)"),
        ({1: "a"}, r"evidence\['k'\] is \{1: 'a'\} \(dict\)"),
        ([1, {"deep": [0, -math.inf]}], r"evidence\['k'\]\[1\]\['deep'\]\[1\] is -inf \(float\)"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_place(value: object, where: str) -> None:
    with pytest.raises(
        PlanError, match=rf"^{where}\. Allowed: None, bool, int, finite float, str, .*Pass a plain number"
    ):
        freeze({"fine": 1, "k": value})


def test_nesting_is_bounded_so_a_cycle_is_refused() -> None:
    nested: Any = 1
    for _ in range(MAX_DEPTH - 1):
        nested = [nested]
    assert thaw(freeze({"k": nested})) == {"k": nested}
    cycle: list[Any] = []
    cycle.append(cycle)
    for too_deep in ([nested], cycle):
        with pytest.raises(PlanError, match=rf"\(list\)\. Allowed: .* {MAX_DEPTH} deep at most"):
            freeze({"k": too_deep})


@pytest.mark.parametrize("evidence", [None, [1], "ab", 3])
def test_evidence_itself_is_a_mapping(evidence: Any) -> None:
    with pytest.raises(PlanError, match=r"^evidence is .*\. Allowed: a mapping of names to values\."):
        freeze(evidence)
