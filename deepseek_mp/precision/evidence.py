"""Evidence: JSON values that cannot change once recorded.

`freeze` copies what it is given, mappings to `FrozenDict` and lists to tuples, and refuses what JSON
cannot hold (tensors, NaN, keys that are not strings); `thaw` gives plain dicts and lists again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from deepseek_mp.errors import PlanError, explain
from deepseek_mp.precision.checks import shown

MAX_DEPTH = 8


class FrozenDict(dict[str, Any]):
    """A dict that refuses every change; it still compares, prints, copies and pickles as a dict."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("evidence is read-only: make a new record with the values you want")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


def freeze(evidence: Mapping[str, Any]) -> FrozenDict:
    """A read-only copy; `PlanError` names the value that JSON cannot hold."""
    frozen = _freeze(evidence, "evidence", MAX_DEPTH)
    if isinstance(frozen, FrozenDict):
        return frozen
    raise PlanError(explain(f"evidence is {shown(evidence)}", "a mapping of names to values", "Name the value"))


def _freeze(value: object, where: str, depth: int) -> object:
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if depth and isinstance(value, list | tuple):
        return tuple(_freeze(item, f"{where}[{index}]", depth - 1) for index, item in enumerate(value))
    if depth and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return FrozenDict({key: _freeze(item, f"{where}[{key!r}]", depth - 1) for key, item in value.items()})
    raise PlanError(
        explain(
            f"{where} is {shown(value)} ({type(value).__name__})",
            f"None, bool, int, finite float, str, and lists or str-keyed mappings of these, {MAX_DEPTH} deep at most",
            "Pass a plain number, as float(x), or leave the value out",
        )
    )


def thaw(value: Any) -> Any:
    """The plain dicts and lists that `json` writes."""
    if isinstance(value, dict):
        return {key: thaw(item) for key, item in value.items()}
    return [thaw(item) for item in value] if isinstance(value, tuple) else value
