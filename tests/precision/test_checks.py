"""The checks that values pass when they are built or read."""

from __future__ import annotations

from typing import Any

import pytest

from deepseek_mp.errors import FormatError, PlanError
from deepseek_mp.precision import Role
from deepseek_mp.precision.checks import find, find_member, read_object, require, require_all, shown

NUMBERS = {"one": 1, "two": 2}


def test_find_takes_a_name_or_a_value_of_the_same_type() -> None:
    assert find("number", NUMBERS, "two") == 2
    assert find("number", NUMBERS, 7) == 7


def test_find_raises_the_error_it_is_given() -> None:
    with pytest.raises(FormatError, match=r"^unknown number 'tow'\. Allowed: one, two\. Use one of these .* 'two'\?$"):
        find("number", NUMBERS, "tow", FormatError)


def test_find_member_takes_a_name_or_a_member() -> None:
    assert find_member("role", Role, "dgrad") is Role.DGRAD
    assert find_member("role", Role, Role.WGRAD) is Role.WGRAD
    with pytest.raises(PlanError, match=r"^unknown role 'dgrab'\. Allowed: fprop, dgrad, wgrad\. .* 'dgrad'"):
        find_member("role", Role, "dgrab")


def test_require_returns_the_value_or_names_the_type() -> None:
    assert require("name", "a", str, "Pass a name") == "a"
    with pytest.raises(PlanError, match=r"^name is 3\. Allowed: a value of type str\. Pass a name\.$"):
        require("name", 3, str, "Pass a name")


def test_require_all_makes_a_tuple() -> None:
    assert require_all("names", ["a", "b"], str, "Pass names") == ("a", "b")


@pytest.mark.parametrize("values", ["ab", {"a": 1}, ["a", 3], None, iter(["a"])])
def test_require_all_refuses_other_values(values: object) -> None:
    with pytest.raises(PlanError, match=r"^names are .*\. Allowed: a list or tuple of str\. Pass names\.$"):
        require_all("names", values, str, "Pass names")


@pytest.mark.parametrize("data", [{"a": 1}, {"a": 1, "b": 2, "c": 3}, {"a": 1, 2: 2}, {}])
def test_read_object_wants_exactly_its_keys(data: dict[Any, Any]) -> None:
    with pytest.raises(
        PlanError, match=r"^a thing has the fields \[.*\]\. Allowed: an object with the fields \['a', 'b'\]"
    ):
        read_object("a thing", data, ("a", "b"))


@pytest.mark.parametrize("data", [None, [1, 2], "ab", 3])
def test_read_object_wants_an_object(data: object) -> None:
    assert read_object("a thing", {"b": 2, "a": 1}, ("a", "b")) == {"a": 1, "b": 2}
    with pytest.raises(PlanError, match=r"^a thing is .*\. Allowed: an object with the fields \['a', 'b'\]"):
        read_object("a thing", data, ("a", "b"))


@pytest.mark.parametrize(
    "value", ["x" * 10_000, list(range(10_000)), dict.fromkeys(range(1000), "x" * 50), [[["y" * 300] * 9] * 9] * 9]
)
def test_messages_stay_short_for_large_values(value: object) -> None:
    assert shown("layer4.0.conv1") == "'layer4.0.conv1'"
    assert shown(value).endswith("...")
    assert len(shown(value)) < 250
