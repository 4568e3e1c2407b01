"""A curve in few characters: some of its points, and a line of blocks whose height is the value."""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII_BLOCKS = "_.-:=+*#"
"""For terminals whose encoding lacks blocks."""
NOT_FINITE = "!"


def sparkline(values: Sequence[float], width: int = 60, blocks: str = BLOCKS) -> str:
    """At most `width` characters, each the mean of a part of `values`; `!` for a part with one that is not finite."""
    parts = [values[start:end] for start, end in _parts(len(values), width)]
    means = [math.fsum(part) / len(part) if all(map(math.isfinite, part)) else math.nan for part in parts]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    return "".join(_block(mean, low, high, blocks) for mean in means)


def spaced(count: int, wanted: int) -> list[int]:
    """At most `wanted` places of `count`, evenly spaced, the first and the last among them."""
    if count <= wanted:
        return list(range(count))
    if wanted < 2:
        return [count - 1][:wanted]
    return sorted({round(index * (count - 1) / (wanted - 1)) for index in range(wanted)})


def _parts(count: int, width: int) -> list[tuple[int, int]]:
    """Start and end of at most `width` parts of `count` values, as equal as can be."""
    parts = min(count, width)
    return [(index * count // parts, (index + 1) * count // parts) for index in range(parts)]


def _block(mean: float, low: float, high: float, blocks: str) -> str:
    if not math.isfinite(mean):
        return NOT_FINITE
    if high == low:
        return blocks[0]
    return blocks[round((mean / 2 - low / 2) / (high / 2 - low / 2) * (len(blocks) - 1))]
