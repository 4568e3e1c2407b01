"""A function with code of its own, for code that is compiled more than once in a process."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from types import FunctionType
from typing import Any

_numbers = count()


def with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of the function, to be compiled apart from others of the same code.

    Dynamo keeps what it compiled by code object, up to a limit behind which it runs eager code, and what it learned of
    changing sizes by that object's name: two callers in one process would share both.
    """
    assert isinstance(function, FunctionType)
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    return FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
