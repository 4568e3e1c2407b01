"""Conditions on the sizes of a program's inputs: what the exporter assumed, as text, and evaluated without `eval`.

A condition is a comparison of numbers and of names like `t0_1`, the second size of the first input. The exporter's own
are Python expressions of the inputs, which it would compile.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_SIZE = re.compile(r"""L((?:\['[^']*'\]|\["[^"]*"\]|\[\d+\]|\.\w+)+)\.size\(\)\[(\d+)\]""")
_PLACE = re.compile(r"\bt(\d+)_(\d+)\b")
_LONGEST = 10_000
"""Characters of a condition; Python's parser goes as deep as they are nested."""
_ARITHMETIC: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Div: operator.truediv,
    ast.BitAnd: lambda left, right: int(left) & int(right),
    ast.Pow: lambda left, right: _root(left, right),
}
_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "min": min,
    "max": max,
    "round": lambda value: round(value),  # to other digits it could compute a number of any length
    "math.ceil": math.ceil,
    "math.floor": math.floor,
    "math.trunc": math.trunc,
    "torch.sym_float": float,
}
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}


def named(guard: str, places: Mapping[str, int]) -> str:
    """The exporter's guard as a condition.

    Args:
        guard: like "L['args'][0].size()[0] == 4".
        places: by path of an input ("['args'][0]", "['pair'].first"), its index.

    Raises:
        ValueError: it is about something else than sizes of inputs.
    """

    def name(found: re.Match[str]) -> str:
        if found[1] not in places:
            raise ValueError(f"a condition on {found[1]}")
        return f"t{places[found[1]]}_{found[2]}"

    return known(_SIZE.sub(name, guard))


def moved(condition: str, indices: Sequence[int]) -> str:
    """The same of inputs in another order: what was input `i` is `indices[i]` now."""
    return _PLACE.sub(lambda found: f"t{indices[int(found[1])]}_{found[2]}", condition)


def readable(condition: str, names: Sequence[str]) -> str:
    """As it is shown: `x.shape[1]` in place of `t0_1`, with these names of the inputs."""
    return _PLACE.sub(lambda found: f"{names[int(found[1])]}.shape[{found[2]}]", condition)


def known(condition: str) -> str:
    """The condition itself; `ValueError` for what `holds` does not evaluate."""
    if len(condition) > _LONGEST:
        raise ValueError(f"a condition of {len(condition)} characters")
    try:
        _known(ast.parse(condition, mode="eval").body)
    except (SyntaxError, ArithmeticError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{condition[:100]!r} as a condition") from error
    return condition


def holds(condition: str, sizes: Mapping[str, int]) -> bool:
    """Whether it is true of the sizes, by name; it is not where it has no value.

    Raises:
        ValueError: it is no condition, or has a name that is not among the sizes.
    """
    try:
        return bool(_value(ast.parse(condition, mode="eval").body, sizes))
    except ArithmeticError:  # such as for the root of a negative number: the model's code would have failed at it
        return False


def _known(node: ast.expr) -> None:
    """`ValueError` for what `_value` does not evaluate."""
    names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)} - {"min", "max", "round"}
    _value(node, dict.fromkeys(names, 7))


def _value(node: ast.expr, sizes: Mapping[str, int]) -> Any:
    match node:
        case ast.Constant(value=int(value) | float(value)):
            return value
        case ast.Name(id=name) if name in sizes:
            return sizes[name]
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner, sizes)
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            return not _value(inner, sizes)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _arithmetic(op, _value(left, sizes), _value(right, sizes))
        case ast.Call(func=called, args=args, keywords=[]) if args and ast.unparse(called) in _FUNCTIONS:
            return _FUNCTIONS[ast.unparse(called)](*(_value(arg, sizes) for arg in args))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
            return _COMPARISONS[type(op)](_value(left, sizes), _value(right, sizes))
        case ast.BoolOp(op=op, values=values):
            found = [bool(_value(value, sizes)) for value in values]
            return all(found) if isinstance(op, ast.And) else any(found)
        case _:
            raise ValueError(f"a condition with {ast.unparse(node)}")


def _arithmetic(op: ast.operator, left: Any, right: Any) -> Any:
    """A division by zero gives zero: where a size is none, the model's code would have failed at it."""
    divides = isinstance(op, ast.FloorDiv | ast.Mod | ast.Div)
    return 0 if divides and right == 0 else _ARITHMETIC[type(op)](left, right)


def _root(left: float, right: float) -> float:
    """The one power that is known, since others could be numbers of any length."""
    if right != 0.5:
        raise ValueError(f"a condition with {left} ** {right}")
    if left < 0:
        raise ArithmeticError(f"the root of {left}")
    return math.sqrt(left)
