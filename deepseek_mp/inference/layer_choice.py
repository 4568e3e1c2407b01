"""Which linear layers get which kind, from what was measured of them: pure values in, kinds by layer out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from deepseek_mp.precision.allocate import allocate
from deepseek_mp.precision.allocation import LARGEST, Budget, Choice, Item

PLAIN = "16 bits"
_INDEX = re.compile(r"\d+")


@dataclass(frozen=True, kw_only=True)
class Part:
    """Linear layers that get one kind together, or stay in 16 bits.

    A kind counts only in the layers where it is faster; the others of the part stay as they are.
    """

    layers: tuple[str, ...]
    saved: Mapping[str, Mapping[str, float]]
    """Seconds of a call of the model, by kind and layer."""
    errors: Mapping[str, float]
    """What a kind takes of the budget in all of its layers together; those that were not measured are not chosen."""

    def gain(self, kind: str | None) -> float:
        """Seconds that a kind saves in all of its layers."""
        return 0.0 if kind is None else math.fsum(self.saved[kind].values())

    def kinds(self, kind: str | None) -> dict[str, str]:
        """By layer."""
        return {} if kind is None else dict.fromkeys(self.saved[kind], kind)

    def share(self, kind: str) -> float:
        """Of the error, for each layer."""
        return self.errors[kind] / len(self.saved[kind])


def role(layer: str) -> str:
    """What layers of equal role have in common: the name without its numbers."""
    return _INDEX.sub("#", layer)


def by_role(saved: Mapping[str, Mapping[str, float]]) -> list[Part]:
    """Parts of layers of equal role, without errors yet.

    Args:
        saved: seconds by layer and kind, where a kind is faster.
    """
    roles: dict[str, list[str]] = {}
    for layer in saved:
        roles.setdefault(role(layer), []).append(layer)
    return [_part(layers, saved) for layers in roles.values()]


def apart(part: Part) -> list[Part]:
    """A part for each of its layers; a kind's error is that of the part in equal shares."""
    saved = {
        layer: {kind: times[layer] for kind, times in part.saved.items() if layer in times} for layer in part.layers
    }
    return [_part([layer], saved, {kind: part.share(kind) for kind in part.errors}) for layer in part.layers]


def chosen(parts: Sequence[Part], limit: float) -> list[str | None]:
    """The kind of each part, or None for 16 bits: what saves most time while the errors add up to the limit at most.

    Args:
        limit: above 0, in the unit of the errors.
    """
    items = [Item(str(index), tuple(_choices(part))) for index, part in enumerate(parts)]
    found = allocate(items, Budget(loss=min(limit, LARGEST), noise=1.0)).choices
    names = [found[item.name].name for item in items]
    return [None if name == PLAIN else name for name in names]


def better(part: Part, kind: str | None) -> list[str]:
    """The kinds that would save more than the one chosen."""
    return [other for other in part.saved if part.gain(other) > part.gain(kind)]


def taken_back(
    errors: Mapping[str, float], saved: Mapping[str, float], found: float, limit: float, least: int = 1
) -> set[str]:
    """Layers to be taken back so that the rest meets the limit, those of most error for the time they save first.

    Args:
        errors: by layer, as they were predicted.
        saved: seconds by layer.
        found: what all of them together really take, above the limit. All predictions are off by the same factor.
        least: so many are taken back at least: more each time, so that few rounds end it.
    """
    factor = found / max(math.fsum(errors.values()), 1e-300)
    order = sorted(errors, key=lambda layer: (-errors[layer] / saved[layer], saved[layer], layer))
    back: set[str] = set()
    for layer in order:
        left = factor * math.fsum(error for name, error in errors.items() if name not in back)
        if left <= limit and len(back) >= least:
            break
        back.add(layer)
    return back


def _part(
    layers: Iterable[str], saved: Mapping[str, Mapping[str, float]], errors: Mapping[str, float] | None = None
) -> Part:
    by_kind: dict[str, dict[str, float]] = {}
    members = tuple(layers)
    for layer in members:
        for kind, seconds in saved[layer].items():
            by_kind.setdefault(kind, {})[layer] = seconds
    return Part(
        layers=members, saved=by_kind, errors={kind: error for kind, error in (errors or {}).items() if kind in by_kind}
    )


def _choices(part: Part) -> Iterable[Choice]:
    yield Choice(PLAIN, 0.0, 0.0, 0.0)
    for kind, error in part.errors.items():
        yield Choice(kind, -part.gain(kind), error if error <= LARGEST else math.inf, 0.0)
