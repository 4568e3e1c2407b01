"""The part of a training state that is not tensors, as strict JSON that reads back equal.

Optimizers and schedulers keep a little more in their state than JSON knows: a step count as a
dictionary's key, a pair of betas as a tuple, a best loss of infinity. JSON would quietly turn the
key into text and the tuple into a list, and a schedule read back like that no longer fires. Such
values are written as an object with one key, which starts with `$`:

    {"$float": "nan" | "inf" | "-inf"}    a float that is not finite
    {"$tuple": [...]}                     a tuple
    {"$dict": [[key, value], ...]}        a dictionary with keys that are not text, or one like these
    {"$counter": [[key, count], ...]}     a collections.Counter

Nothing here can run code: reading makes these types and no others.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

from deepseek_mp.errors import CheckpointError, explain


def encode_state(state: Mapping[str, Any]) -> bytes:
    """The state as UTF-8 JSON; `CheckpointError` names the key path of a value that has no place in it."""
    try:
        return json.dumps(_encode(state, "state"), allow_nan=False, indent=1).encode("utf-8")
    except RecursionError as error:
        raise CheckpointError(
            explain("state is nested too deeply, or contains itself", "a tree of plain values", "Flatten it")
        ) from error


def decode_state(data: bytes) -> dict[str, Any]:
    """What `encode_state` wrote; `ValueError` if it is something else."""
    state = _decode(json.loads(data))
    if not isinstance(state, dict):
        raise ValueError("state is not an object")
    return state


def _encode(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return _encode(value.value, where)
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, Mapping):
        return _encode_mapping(value, where)
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    raise CheckpointError(
        explain(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}, which a checkpoint does not store",
            "None, booleans, numbers, text, and lists, tuples or dictionaries of them",
            "Put tensors among the snapshot's tensors, convert numbers with int() or float(), and leave functions out",
        )
    )


def _encode_mapping(value: Mapping[Any, Any], where: str) -> Any:
    tagged = len(value) == 1 and next(iter(value)) in _DECODERS
    if all(type(key) is str for key in value) and not isinstance(value, Counter) and not tagged:
        return {key: _encode(item, f"{where}.{key}") for key, item in value.items()}
    pairs = [[_encode(key, f"{where} key {key!r}"), _encode(item, f"{where}.{key}")] for key, item in value.items()]
    return {"$counter" if isinstance(value, Counter) else "$dict": pairs}


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        tag, content = next(iter(value.items()))
        if tag in _DECODERS:
            return _DECODERS[tag](content)
    return {key: _decode(item) for key, item in value.items()}


def _decode_pairs(pairs: Any) -> dict[Any, Any]:
    return {_decode(key): _decode(item) for key, item in pairs}


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "$float": float,
    "$tuple": lambda items: tuple(_decode(item) for item in items),
    "$dict": _decode_pairs,
    "$counter": lambda pairs: Counter(_decode_pairs(pairs)),
}
