"""What kernels read of a table of many parameters: which one a program steps, which part of it, and its pointers.

The columns are those of `ops.pointer_table`.
"""

from __future__ import annotations

import triton
import triton.language as tl

_COUNT: tl.constexpr = tl.constexpr(2)
_FIRST: tl.constexpr = tl.constexpr(3)
_STREAM: tl.constexpr = tl.constexpr(4)
_CHANNELS: tl.constexpr = tl.constexpr(5)
_PIXELS: tl.constexpr = tl.constexpr(6)
_NUMBER: tl.constexpr = tl.constexpr(7)
_WIDTH: tl.constexpr = tl.constexpr(12)


@triton.jit
def owner_of(table, owners):
    """The parameter of this program, and where its row of the table begins."""
    owner = tl.load(owners + tl.program_id(0))
    return owner, table + owner.to(tl.int64) * _WIDTH


@triton.jit
def pointer(place, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer that lies at a place. TYPE is Triton's name of what it points to; ALIGNED to 16 bytes."""
    found = tl.load(place).to(tl.pointer_type(tl.dtype(TYPE)))
    if ALIGNED:  # else the values are read one by one
        found = tl.multiple_of(found, 16)
    return found


@triton.jit
def length(line, skip, SKIPPABLE: tl.constexpr, ALIGNED: tl.constexpr):
    """How many values the parameter has; none where the step is skipped."""
    count = tl.load(line + _COUNT)
    if SKIPPABLE:
        count = tl.where(tl.load(skip) == 0.0, count, 0)
    if ALIGNED:
        count = tl.multiple_of(count, 16)
    return count


@triton.jit
def first_row(line, ROWS: tl.constexpr):
    """The first block of 256 values of this program, in its parameter; int64."""
    return (tl.program_id(0).to(tl.int64) - tl.load(line + _FIRST)) * ROWS


@triton.jit
def in_memory(line, place, PERMUTED: tl.constexpr):
    """Where the values at some places of `flatten()` lie in memory, which is channels_last if PERMUTED."""
    at = place
    if PERMUTED:
        channels = tl.load(line + _CHANNELS).to(tl.int32)
        pixels = tl.load(line + _PIXELS).to(tl.int32)
        filters = place.to(tl.int32) // (channels * pixels)  # there are fewer than 2**31 values
        rest = place.to(tl.int32) - filters * (channels * pixels)
        channel = rest // pixels
        at = filters * (channels * pixels) + (rest - channel * pixels) * channels + channel
    return at


@triton.jit
def stream_of(line):
    """The stream of random bits of the parameter."""
    return tl.load(line + _STREAM)


@triton.jit
def number_of(line):
    """The place of the parameter in vectors of numbers."""
    return tl.load(line + _NUMBER)
