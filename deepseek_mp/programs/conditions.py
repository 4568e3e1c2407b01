"""Conditions on the sizes of a program's inputs: what the exporter assumed, as text, and evaluated without `eval`.

A condition is a comparison of whole numbers and of names like `t0_1`, the second size of the first input. The
exporter's own are Python expressions of the inputs, which it would compile.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

_SIZE = re.compile(r"L((?:\['?\w+'?\])+)\.size\(\)\[(\d+)\]")
_ARITHMETIC: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[int, int], bool]] = {
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
        places: by path of an input ("['args'][0]"), its index.

    Raises:
        ValueError: it is about something else than sizes of inputs.
    """

    def name(found: re.Match[str]) -> str:
        if found[1] not in places:
            raise ValueError(f"a condition on {found[1]}")
        return f"t{places[found[1]]}_{found[2]}"

    made = _SIZE.sub(name, guard)
    _known(ast.parse(made, mode="eval").body)
    return made


def known(condition: str) -> str:
    """The condition itself; `ValueError` for what `holds` does not evaluate."""
    try:
        _known(ast.parse(condition, mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"{condition[:100]!r} as a condition") from error
    return condition


def holds(condition: str, sizes: Mapping[str, int]) -> bool:
    """Whether it is true of the sizes, by name.

    Raises:
        ValueError: it is no condition, or has a name that is not among the sizes.
    """
    return bool(_value(ast.parse(condition, mode="eval").body, sizes))


def _known(node: ast.expr) -> None:
    """`ValueError` for what `_value` does not evaluate."""
    names = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    _value(node, dict.fromkeys(names, 7))


def _value(node: ast.expr, sizes: Mapping[str, int]) -> Any:
    match node:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name) if name in sizes:
            return sizes[name]
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner, sizes)
        case ast.UnaryOp(op=ast.Not(), operand=inner):
            return not _value(inner, sizes)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _arithmetic(op, _value(left, sizes), _value(right, sizes))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in _COMPARISONS:
            return _COMPARISONS[type(op)](_value(left, sizes), _value(right, sizes))
        case ast.BoolOp(op=op, values=values):
            found = [bool(_value(value, sizes)) for value in values]
            return all(found) if isinstance(op, ast.And) else any(found)
        case _:
            raise ValueError(f"a condition with {ast.unparse(node)}")


def _arithmetic(op: ast.operator, left: int, right: int) -> int:
    """A division by zero gives zero: no size is one, so that no comparison comes to rest on it."""
    divides = isinstance(op, ast.FloorDiv | ast.Mod)
    return 0 if divides and right == 0 else _ARITHMETIC[type(op)](left, right)
