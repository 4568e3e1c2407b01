"""How quantised operands and their scales lie in memory.

A product reads two operands. Each is a matrix [outer, contraction] whose contraction, the extent that
is summed over, comes last and is contiguous. Values are FP8, one byte each. Scales are fp32 and undo
the quantisation: x ~ q * scale. They are stored as the libraries of today's devices read them:

    granularity   scales of an operand [outer, contraction]
    tensor        []
    row           [outer]
    1x128         [contraction / 128, outer]
    1x32          [contraction / 32, outer]
    128x128       [outer / 128, contraction / 128]
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from deepseek_mp.errors import ShapeError, explain

ALIGNMENT: Mapping[str, int] = MappingProxyType({"tensor": 16, "row": 16, "1x32": 32, "1x128": 128, "128x128": 128})
"""Both extents of an operand are multiples of this: what matrix units take, or whole groups."""
PAIRS = (("tensor", "tensor"), ("row", "row"), ("1x128", "128x128"), ("1x128", "1x128"), ("1x32", "1x32"))
"""The granularities, left and right, of operands that Triton's kernel multiplies; the reference takes any two."""


def alignment(granularity: str) -> int:
    """What both extents of an operand of this granularity must be multiples of."""
    if granularity not in ALIGNMENT:
        allowed = ", ".join(ALIGNMENT)
        raise ShapeError(explain(f"granularity {granularity!r}", allowed, "Use one that the ops quantise by"))
    return ALIGNMENT[granularity]


def padded_rows(count: int, granularity: str) -> int:
    """`count` rounded up to a multiple of the alignment."""
    multiple = alignment(granularity)
    return (count + multiple - 1) // multiple * multiple


def scale_shape(granularity: str, outer: int, contraction: int) -> tuple[int, ...]:
    """Shape of the stored scales of an operand [outer, contraction], both multiples of the alignment."""
    block = alignment(granularity)
    if granularity == "tensor":
        return ()
    if granularity == "row":
        return (outer,)
    if granularity == "128x128":
        return (outer // block, contraction // block)
    return (contraction // block, outer)


def check_width(width: int, granularity: str) -> None:
    """`ShapeError` if the width of a matrix does not consist of whole groups."""
    multiple = alignment(granularity)
    if width % multiple:
        raise ShapeError(
            explain(
                f"a matrix {width} wide to quantise by {granularity}",
                f"widths that are multiples of {multiple}",
                "Use another granularity, or another width",
            )
        )
