"""Statistics by layer as a table: the few numbers that one looks at first."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deepseek_mp.monitor.layer_statistics import SAMPLED, LayerStatistics, Value
from deepseek_mp.monitor.table import columns

Cell = Callable[[LayerStatistics], "Value | None"]
ABSENT = "."


def _spread(tensor: str, field: str) -> Cell:
    return lambda layer: layer.tensors[tensor].spread[field] if tensor in layer.tensors else None


def _error(tensor: str, field: str) -> Cell:
    return lambda layer: layer.tensors[tensor].errors["in_use"][field] if tensor in layer.tensors else None


def _update(field: str) -> Cell:
    return lambda layer: layer.update.get(field)


COLUMNS: Mapping[str, Cell] = {
    "max |x|": _spread("input", "amax"),
    "kurtosis": _spread("input", "kurtosis"),
    "error x": _error("input", "by_row"),
    "error w": _error("weight", "by_row"),
    "error dy": _error("grad_output", "by_row"),
    "|dw|/|w|": _update("ratio"),
    "|g|": _update("grad_norm"),
}
"""Heading -> what stands below: means over the samples, errors those of the format in use, by row."""


def statistics_table(statistics: Mapping[str, LayerStatistics], limit: int) -> str:
    """Means of at most `limit` layers; '' if none was sampled."""
    sampled = [layer for layer in statistics.values() if layer.status == SAMPLED and layer.recipe is not None]
    if not sampled:
        return ""
    rows = [
        (layer.layer or "(model)", str(layer.recipe), *(_shown(cell(layer)) for cell in COLUMNS.values()))
        for layer in sampled
    ]
    lines = columns([("statistics", "recipe", *COLUMNS), *rows[:limit]])
    if len(rows) > limit:
        lines.append(f"... and {len(rows) - limit} more layers")
    return "\n".join(lines)


def _shown(value: Value | None) -> str:
    return ABSENT if value is None or value.mean is None else f"{value.mean:.3g}"
