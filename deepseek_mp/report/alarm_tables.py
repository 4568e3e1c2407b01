"""Alarms of many layers as few rows: one for each tensor and statistic of layers whose names differ in indices."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from deepseek_mp.report.alarms import AlarmDifference, Alarms
from deepseek_mp.report.amounts import UNKNOWN, value
from deepseek_mp.report.group import Key, grouped, merged

ALARM_HEADING = ("layer", "layers", "tensor", "statistic", "times", "first at step", "largest", "limit")
DIFFERENCE_HEADING = (
    "layer", "layers", "tensor", "statistic", "times in A", "times in B", "first in A", "first in B"
)  # fmt: skip


def alarm_rows(alarms: Iterable[Alarms]) -> list[Key]:
    """Rows under `ALARM_HEADING`: times of all layers together, the first step and the largest value of any."""
    by_what = {found.what: found for found in alarms}
    rows: list[Key] = []
    for group in merged(grouped((layer, (tensor, kind)) for layer, tensor, kind in by_what)):
        tensor, kind = group.key
        some = [by_what[layer, tensor, kind] for layer in group.layers]
        largest = max((found.largest for found in some if found.largest is not None), default=None)
        cells = (*_together(some), value(largest, 4), _range([f.limit for f in some if f.limit is not None]))
        rows.append((group.pattern, str(len(group.layers)), tensor, kind, *cells))
    return rows


def alarm_difference_rows(differences: Iterable[AlarmDifference]) -> list[Key]:
    """Rows under `DIFFERENCE_HEADING`: layers whose alarms are in A only, in B only or in both are not put together."""
    by_what = {found.what: found for found in differences}
    keyed = [
        (layer, (tensor, kind, "A" if found.a else "", "B" if found.b else ""))
        for (layer, tensor, kind), found in by_what.items()
    ]
    rows: list[Key] = []
    for group in merged(grouped(keyed)):
        tensor, kind, _, _ = group.key
        some = [by_what[layer, tensor, kind] for layer in group.layers]
        (times_a, first_a), (times_b, first_b) = (
            _together([alarms for alarms in run if alarms is not None])
            for run in ([found.a for found in some], [found.b for found in some])
        )
        rows.append((group.pattern, str(len(group.layers)), tensor, kind, times_a, times_b, first_a, first_b))
    return rows


def _together(alarms: Sequence[Alarms]) -> tuple[str, str]:
    """How often they came, and when first."""
    if not alarms:
        return "0", UNKNOWN
    return str(sum(found.times for found in alarms)), str(min(found.first_step for found in alarms))


def _range(numbers: Sequence[float]) -> str:
    if not numbers:
        return UNKNOWN
    low, high = value(min(numbers), 4), value(max(numbers), 4)
    return low if low == high else f"{low}..{high}"
