"""Decisions: what they hold, say, write and read."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from deepseek_mp.errors import PlanError
from deepseek_mp.precision import Decision, Reason, Role

SLOWER = Decision(
    layer="layer1.conv1",
    old="bf16",
    new="fp32",
    reason=Reason.MEASURED_SLOWER,
    role=Role.WGRAD,
    detail="BF16 lost",
    evidence={"bf16_ms": 3.0, "fp32_ms": 2.0, "runs": [1, 2]},
)


@pytest.mark.parametrize("reason", Reason)
@pytest.mark.parametrize("role", [None, *Role])
def test_json_round_trip(reason: Reason, role: Role | None) -> None:
    decision = replace(SLOWER, reason=reason, role=role)
    again = Decision.from_json(json.loads(json.dumps(decision.to_json(), allow_nan=False)))
    assert again == decision
    assert again.reason is reason
    assert again.role is role


def test_json_has_plain_values() -> None:
    data = SLOWER.to_json()
    assert (type(data["reason"]), type(data["role"]), data["evidence"]["runs"]) == (str, str, [1, 2])
    data["evidence"]["runs"].append(3)
    assert SLOWER.to_json()["evidence"]["runs"] == [1, 2]


def test_reason_and_role_may_be_given_by_name() -> None:
    values: dict[str, Any] = {**SLOWER.to_json(), "reason": "measured_slower", "role": "wgrad"}
    decision = Decision(**values)
    assert decision.reason is Reason.MEASURED_SLOWER
    assert decision.role is Role.WGRAD


def test_equality_sees_the_evidence_and_hash_agrees() -> None:
    other = replace(SLOWER, evidence={"bf16_ms": 4.0})
    assert other != SLOWER
    same = replace(SLOWER)
    assert same == SLOWER
    assert hash(same) == hash(SLOWER)
    assert len({SLOWER, same, other}) == 2


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layer", 3, r"^decision field layer is 3\. Allowed: a value of type str\."),
        ("old", None, r"^decision field old is None\."),
        ("new", ["bf16"], r"^decision field new is \['bf16'\]\."),
        ("detail", None, r"^decision field detail is None\."),
        ("reason", "pined", r"^unknown reason 'pined'\. Allowed: requested, pinned, .* Did you mean 'pinned'"),
        ("reason", None, r"^unknown reason None\."),
        ("role", "forward", r"^unknown role 'forward'\. Allowed: fprop, dgrad, wgrad\."),
        ("role", Reason.PINNED, r"^unknown role <Reason\.PINNED"),
        ("evidence", {"loss": float("nan")}, r"^evidence\['loss'\] is nan \(float\)\."),
        ("evidence", None, r"^evidence is None\. Allowed: a mapping"),
    ],
)
def test_other_values_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Decision.from_json({**SLOWER.to_json(), field: value})
    with pytest.raises(PlanError, match=message):
        replace(SLOWER, **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("field", SLOWER.to_json())
def test_json_without_a_field_is_refused(field: str) -> None:
    data = SLOWER.to_json()
    del data[field]
    with pytest.raises(PlanError, match=rf"^a decision has the fields \[.*\]\. Allowed: .*'{field}'"):
        Decision.from_json(data)


def test_text_says_what_and_why() -> None:
    assert str(SLOWER) == "layer1.conv1 bf16 -> fp32 (measured_slower: BF16 lost)"
    whole = Decision(layer="", old="fp32", new="bf16", reason=Reason.REQUESTED)
    assert str(whole) == "(model) fp32 -> bf16 (requested)"
