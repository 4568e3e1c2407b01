"""Choices of many layers as few rows: the layers as patterns, and reasons that differ in numbers only as one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby, zip_longest

from deepseek_mp.report.amounts import ranges, value
from deepseek_mp.report.group import Group, Key, grouped, merged
from deepseek_mp.report.layers import Choice
from deepseek_mp.report.settings import as_text

NUMBER = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:[eE][+-]?\d+)?(?![\w])")
"""A number that stands alone: not the digits of fp32, 1x128 or layer4."""

CHOICE_HEADING = ("step", "layer", "layers", "role", "old", "new", "reason", "evidence")
SHOWN_RUNS = 12
"""Runs of steps in a row that are listed for one layer."""
SATURATED_HEADING = ("layer", "role", "recipe", "times", "steps")


def choice_rows(choices: Iterable[Choice], *, by_step: bool = False) -> list[Key]:
    """Rows under `CHOICE_HEADING`. Without `by_step` the step is empty, and choices of all steps are put together."""
    rows: list[Key] = []
    for step, some in groupby(choices, key=lambda choice: str(choice.step) if by_step else ""):
        groups = choice_groups(list(some))
        rows += [(step, group.pattern, str(len(group.layers)), *group.key) for group in groups]
    several = any(row[2] != "1" for row in rows)
    return rows if several else [(*row[:2], "", *row[3:]) for row in rows]


def choice_groups(choices: Sequence[Choice]) -> list[Group]:
    """Layers with one role, old and new recipe, reason and evidence; the group's key is these five as text."""
    texts = {(choice.layer, choice.role): why(choice) for choice in choices}
    masked = [
        (c.layer, (c.role or "", c.old, c.new, c.reason, NUMBER.sub("#", texts[c.layer, c.role]))) for c in choices
    ]
    return merged([_spelled_out(group, texts) for group in grouped(masked)])


def saturated_rows(events: Iterable[Choice]) -> list[Key]:
    """Rows under `SATURATED_HEADING`: of each layer and role, how often its scale was outgrown, and when."""
    steps: dict[tuple[str, str, str], list[int]] = {}
    for event in events:
        steps.setdefault((event.layer, event.role or "", event.new), []).append(event.step)
    keyed = [
        (layer, (role, recipe, str(len(at)), ranges(sorted(set(at)), limit=SHOWN_RUNS)))
        for (layer, role, recipe), at in steps.items()
    ]
    return [(group.pattern, *group.key) for group in merged(grouped(keyed))]


def why(choice: Choice) -> str:
    """The reason's detail and its evidence, on one line."""
    evidence = ", ".join(f"{name} {_plain(item)}" for name, item in choice.evidence.items())
    return "; ".join(filter(None, (choice.detail, evidence)))


def _plain(item: object) -> str:
    return value(item, 4) if isinstance(item, float) else as_text(item)


def _spelled_out(group: Group, texts: dict[tuple[str, str | None], str]) -> Group:
    """The group with the evidence of its layers in place of the masked one."""
    role = group.key[0] or None
    text = _together([texts[layer, role] for layer in group.layers])
    return replace(group, key=(*group.key[:-1], text))


def _together(texts: Sequence[str]) -> str:
    """Texts that differ in numbers only as one: a number that is not the same in all becomes lowest..highest."""
    between = NUMBER.split(texts[0])
    columns = zip(*map(NUMBER.findall, texts), strict=True)
    numbers = [_range(column) for column in columns]
    return "".join(part for pair in zip_longest(between, numbers, fillvalue="") for part in pair)


def _range(numbers: Sequence[str]) -> str:
    ordered = sorted(set(numbers), key=float)
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]}..{ordered[-1]}"
