"""Names of layers that have the same to say, as few patterns: blocks.0.mlp, blocks.1.mlp, ... are blocks.*.mlp.

A pattern covers exactly the layers of its group among all that are named: `*` stands for every index there
is, `{0-3,7}` for some, `{up, down}` for several last parts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deepseek_mp.report.amounts import ranges

Index = tuple[int, ...]
Key = tuple[str, ...]
"""What layers of a group have in common, as the cells of a row."""
WHOLE = "(model)"
"""How the layer '' is called: the model itself."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Layers with one key, in the order they were given."""

    pattern: str
    layers: tuple[str, ...]
    key: Key


def grouped(layers: Iterable[tuple[str, Key]]) -> list[Group]:
    """Groups of layers with equal keys whose names differ in indices only, in the order of their first layer.

    A layer may be given several times, with different keys.
    """
    given = list(layers)
    universe: dict[str, set[Index]] = defaultdict(set)
    members: dict[tuple[str, Key], list[str]] = defaultdict(list)
    for name, key in given:
        template, index = _template(name)
        universe[template].add(index)
        members[template, key].append(name)
    found = []
    for (template, key), names in members.items():
        by_index = {_template(name)[1]: name for name in names}
        for sets in _boxes(set(by_index), universe[template]):
            inside = [name for index, name in by_index.items() if all(i in s for i, s in zip(index, sets, strict=True))]
            found.append(Group(pattern=_fill(template, sets, universe[template]), layers=tuple(inside), key=key))
    return found


def merged(groups: Sequence[Group]) -> list[Group]:
    """Groups of one key that differ in the last part of their names, as one."""
    together: dict[tuple[str, Key], list[Group]] = defaultdict(list)
    for group in groups:
        together[group.pattern.rpartition(".")[0], group.key].append(group)
    return [
        Group(
            pattern=_join(prefix, [group.pattern.rpartition(".")[2] for group in some]),
            layers=tuple(name for group in some for name in group.layers),
            key=key,
        )
        for (prefix, key), some in together.items()
    ]


def _join(prefix: str, lasts: Sequence[str]) -> str:
    if len(lasts) == 1 or not prefix:
        return ".".join(filter(None, (prefix, ", ".join(lasts))))
    return f"{prefix}.{{{', '.join(lasts)}}}"


def _template(name: str) -> tuple[str, Index]:
    """The name with a `*` for every index, and the indices."""
    parts = name.split(".")
    template = ".".join("*" if part.isdecimal() else part for part in parts)
    return template or WHOLE, tuple(int(part) for part in parts if part.isdecimal())


def _boxes(members: set[Index], universe: set[Index]) -> list[tuple[frozenset[int], ...]]:
    """The members as few products of sets of indices, one set a place."""
    if members == universe or not members or members == {()}:
        return [tuple(map(frozenset, zip(*members, strict=True)))]
    by_first: dict[int, set[Index]] = defaultdict(set)
    for index in members:
        by_first[index[0]].add(index[1:])
    firsts: dict[frozenset[Index], set[int]] = defaultdict(set)
    for first, rest in sorted(by_first.items()):
        firsts[frozenset(rest)].add(first)
    boxes = []
    for rests, some in firsts.items():
        below = {index[1:] for index in universe if index[0] in some}
        boxes += [(frozenset(some), *box) for box in _boxes(set(rests), below)]
    return boxes


def _fill(template: str, sets: tuple[frozenset[int], ...], universe: set[Index]) -> str:
    """The template with what stands for each of its indices."""
    every = list(map(frozenset, zip(*universe, strict=True)))
    words = iter("*" if some == all_ and len(all_) > 1 else _some(some) for some, all_ in zip(sets, every, strict=True))
    return ".".join(next(words) if part == "*" else part for part in template.split("."))


def _some(indices: frozenset[int]) -> str:
    text = ranges(sorted(indices))
    return text if text.isdecimal() else f"{{{text}}}"
