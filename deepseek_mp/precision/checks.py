"""The checks that values pass when they are built or read, each with one form of message.

A value may be given by its name wherever it is taken (`"bf16"` for the recipe, `"row"` for the
granularity), so the constructors that look names up also read the values of a JSON file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum
from typing import Any, TypeVar

from deepseek_mp.errors import ConfigError, PlanError, explain, suggest

T = TypeVar("T")
Member = TypeVar("Member", bound=StrEnum)
LONGEST_SHOWN = 200


def shown(value: object) -> str:
    """A value as messages show it: its repr, cut where it is long."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def find(what: str, known: Mapping[str, T], value: object, error: type[ConfigError] = PlanError) -> T:
    """The entry of `known` that `value` names, or `value` itself when it is of the entries' type (not str)."""
    kind = type(next(iter(known.values())))
    if isinstance(value, kind):
        return value
    if isinstance(value, str) and value in known:
        return known[value]
    hint = suggest(value, known) if isinstance(value, str) else ""
    raise error(explain(f"unknown {what} {shown(value)}", ", ".join(known), f"Use one of these names.{hint}"))


def find_member(what: str, kind: type[Member], value: object) -> Member:
    """The member of the enumeration `kind` that `value` is or names."""
    return find(what, {member.value: member for member in kind}, value)


def require(what: str, value: object, kind: type[T], change: str) -> T:
    """`value`, which must be of type `kind`; `change` tells the caller what to pass instead."""
    if isinstance(value, kind):
        return value
    raise PlanError(explain(f"{what} is {shown(value)}", f"a value of type {kind.__name__}", change))


def require_all(what: str, values: object, kind: type[T], change: str) -> tuple[T, ...]:
    """`values` as a tuple; it must be a list or tuple whose elements are of type `kind`."""
    if isinstance(values, list | tuple) and all(isinstance(value, kind) for value in values):
        return tuple(values)
    raise PlanError(explain(f"{what} are {shown(values)}", f"a list or tuple of {kind.__name__}", change))


def read_object(what: str, data: object, keys: Collection[str]) -> Mapping[str, Any]:
    """`data`, which must be a JSON object with exactly these keys."""
    if not isinstance(data, Mapping):
        passed = f"{what} is {shown(data)}"
    elif set(data) != set(keys):
        passed = f"{what} has the fields {shown(sorted(map(str, data)))}"
    else:
        return data
    raise PlanError(explain(passed, f"an object with the fields {list(keys)}", "Write it as PrecisionPlan.save does"))
