"""Numbers with their unit as text: times, sizes, energies, ratios, counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deepseek_mp.report.spread import Spread

UNKNOWN = "-"


def value(number: float | None, digits: int = 5) -> str:
    """A number in few digits; what is not finite is named as in the record."""
    if number is None:
        return UNKNOWN
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    if abs(number) < 1e15 and number == int(number):
        return f"{int(number)}"
    return f"{number:.{digits}g}"


def seconds(number: float | None) -> str:
    """A duration in the unit that suits it."""
    if number is None or not math.isfinite(number):
        return value(number)
    if number < 1:
        return f"{1e3 * number:.3g} ms" if number >= 1e-3 else f"{1e6 * number:.3g} µs"
    if number < 120:
        return f"{number:.3g} s"
    minutes = round(number / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def size(number: float | None) -> str:
    """A number of bytes."""
    if number is None or not math.isfinite(number):
        return value(number)
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"


def energy(number: float | None) -> str:
    """An energy in joules, or kilojoules."""
    if number is None or not math.isfinite(number) or number < 1e4:
        return UNKNOWN if number is None else f"{value(number, 4)} J"
    return f"{number / 1e3:.4g} kJ"


def percent(share: float | None) -> str:
    """A relative difference with its sign, from ten on as a factor; what cannot be divided is said."""
    if share is None:
        return UNKNOWN
    if not math.isfinite(share):
        return "no ratio"
    if share >= 10:
        return f"{share + 1:.4g} times"
    return f"{100 * share:+.3g} %" if share else "0 %"


def times(spread: Spread) -> str:
    """Median of durations, and what 80 % of them lie between."""
    return f"{seconds(spread.median)} (80 % within {seconds(spread.low)} to {seconds(spread.high)})"


def counted(count: int, noun: str) -> str:
    """`1 step`, `2 steps`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def ranges(numbers: Sequence[int], limit: int | None = None) -> str:
    """Sorted whole numbers with three or more in a row written as first-last: 1,2,5-8; at most `limit` such parts."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs]
    if limit is None or len(parts) <= limit:
        return ",".join(parts)
    return f"{','.join(parts[:limit])},... {numbers[-1]}"
