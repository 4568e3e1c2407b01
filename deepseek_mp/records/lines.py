"""Values of a run record as strict JSON, one object a line, with NaN and infinities kept visible.

JSON has no NaN and no infinity. They are written as the strings "NaN", "Infinity" and "-Infinity",
and become numbers again when read, so a loss that was NaN is never null, missing or zero. A text
that is exactly one of these three words is therefore read as a number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

from deepseek_mp.errors import ConfigError, explain

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_plain(value: Any, where: str) -> Any:
    """`value` as what strict JSON can hold; `where` names it in the error.

    Takes None, booleans, numbers, text, enums, paths, mappings, sequences, sets, objects with a
    `to_json()` method, and 0-dim arrays or tensors, which are read with `item()` (this waits for
    their device). Anything else is a `ConfigError`.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return to_plain(value.value, where)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else _word(value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {_key(key): to_plain(item, f"{where}.{_key(key)}") for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if callable(getattr(value, "to_json", None)):
        return to_plain(value.to_json(), where)
    if getattr(value, "shape", None) == () and callable(getattr(value, "item", None)):
        return to_plain(value.item(), where)
    raise ConfigError(
        explain(
            f"{where} is a {type(value).__name__}, which a run record cannot hold",
            "numbers, text, None, and lists or mappings of them",
            "Convert it, for instance with float(...) or str(...), or leave it out",
        )
    )


def from_plain(value: Any) -> Any:
    """A JSON value with the three words of `NON_FINITE` turned back into numbers."""
    if isinstance(value, str):
        return NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [from_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: from_plain(item) for key, item in value.items()}
    return value


def encode(fields: Mapping[str, Any], where: str, indent: int | None = None) -> str:
    """One JSON object; on one line unless `indent` is given."""
    return json.dumps(to_plain(fields, where), allow_nan=False, indent=indent)


def decode(line: str | bytes) -> dict[str, Any] | None:
    """The object of one line, or None if the line is not a whole JSON object."""
    try:
        value = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    return from_plain(value) if isinstance(value, dict) else None


def _key(key: Any) -> str:
    return str(key.value) if isinstance(key, Enum) else str(key)


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
