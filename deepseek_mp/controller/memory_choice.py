"""Chooses ways to save memory, by their measured cost per byte, so that a step fits a budget with the least slowdown.

The measures are weighed alone, put in order, and added one by one until the step fits. Savings do not add up (the
highest point of a step may lie elsewhere once one measure is taken), so that no set is taken that was not tried as it
is; and a measure that was taken early may be needless in the end, so each is left out once more, the slowest first. No
set is tried whose predicted peak is far above what is allowed: a step that runs out of memory takes time too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

NOISE = 0.02
"""Extra time below this share of a step is within what timings of equal steps differ by: it counts as none."""
FAR = 1.3
"""A predicted peak above so many times the limit is hopeless. What is left out of the savings that were weighed on a
part of the batch, such as a buffer that does not grow with it, is less than that."""
COMFORTABLE = 15 / 16
"""A predicted peak up to this share of the limit is taken to fit."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One way to save memory, or one step further along such a way."""

    name: str
    exact: bool
    """Whether numbers stay those of the plain step, but for the rounding of sums."""
    by_batch: bool
    """Whether what it saves, and what it costs, grows with the batch."""
    after: str = ""
    """Name of the measure that this one goes further than, and needs."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a step took when it was tried."""

    peak_bytes: int | None
    """The most memory in tensors; None: it did not suffice."""
    seconds: float | None = None
    """Time of a step; None where it was not taken."""

    def fits(self, limit_bytes: int) -> bool:
        return self.peak_bytes is not None and self.peak_bytes <= limit_bytes


@dataclass(frozen=True, kw_only=True)
class Known:
    """Measures that the step is known to go through with."""

    measures: frozenset[str]
    """Their names."""
    peak_bytes: int
    """What it holds then, about."""


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """What a measure saves and costs in one step, beside what it builds on."""

    measure: Measure
    saved_bytes: int | None = None
    """None where it could not be tried alone."""
    extra_seconds: float | None = None
    cost: float = math.inf
    """Seconds for each byte saved; infinite where nothing is, or nothing is known."""


Try = Callable[[tuple[Measure, ...]], Trial]
"""Makes the whole step with these measures."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """What the choice ended with."""

    taken: tuple[Measure, ...]
    """In the order in which they were taken."""
    trial: Trial
    """The step with them."""
    fits: bool
    needless: tuple[Measure, ...] = ()
    """Taken, and left out again, since the step fits without."""


def weigh(base: Trial, alone: Mapping[Measure, Trial], *, scale: float = 1.0) -> tuple[Weighed, ...]:
    """The measures by cost per byte saved, the cheapest first; of equal cost exact ones, then those that save more.

    A measure is weighed beside the one that it builds on, and comes after it. Where it costs less than that one, the
    two count as one step, at what they cost together. Those that save nothing come last: the highest point of the step
    lies where they do not reach.

    Args:
        base: the step as it is, with its time.
        alone: the step with each measure and those that it builds on, in order.
        scale: how many times the steps that were tried the whole batch is; measures that go by it grow so.
    """
    by_name = {measure.name: trial for measure, trial in alone.items()}
    weighed = {
        measure.name: _beside(by_name.get(measure.after, base), trial, measure, scale)
        for measure, trial in alone.items()
    }
    noise = NOISE * (base.seconds or 0.0)
    cost: dict[str, float] = {}
    for way in _ways(tuple(alone)):
        cost |= _costs([weighed[measure.name] for measure in way], noise)
    place = {measure.name: number for number, measure in enumerate(alone)}

    def key(one: Weighed) -> tuple[float, bool, int, int]:
        root = _root(one.measure, tuple(alone))  # the steps of one way stay together where they cost the same
        return cost[one.measure.name], not one.measure.exact, -(weighed[root].saved_bytes or 0), place[one.measure.name]

    return tuple(sorted((replace(one, cost=cost[name]) for name, one in weighed.items()), key=key))


def _beside(before: Trial, after: Trial, measure: Measure, scale: float) -> Weighed:
    if before.peak_bytes is None or after.peak_bytes is None or before.seconds is None or after.seconds is None:
        return Weighed(measure=measure)
    times = scale if measure.by_batch else 1.0
    saved = round(times * (before.peak_bytes - after.peak_bytes))
    return Weighed(measure=measure, saved_bytes=saved, extra_seconds=times * (after.seconds - before.seconds))


def _root(measure: Measure, measures: Sequence[Measure]) -> str:
    """Name of the first measure of the way that this one is on."""
    before = next((one for one in measures if one.name == measure.after), None)
    return measure.name if before is None else _root(before, measures)


def _ways(measures: Sequence[Measure]) -> list[list[Measure]]:
    """The measures in groups: each with those that build on it, in order."""
    roots = dict.fromkeys(_root(measure, measures) for measure in measures)
    return [[measure for measure in measures if _root(measure, measures) == root] for root in roots]


def _costs(way: Sequence[Weighed], noise: float) -> dict[str, float]:
    """Seconds per byte of each step along a way, never falling: steps that would are taken together."""
    blocks: list[list[Weighed]] = []
    for one in way:
        blocks.append([one])
        while len(blocks) > 1 and _cost(blocks[-2], noise) > _cost(blocks[-1], noise):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return {one.measure.name: _cost(block, noise) for block in blocks for one in block}


def _cost(block: Sequence[Weighed], noise: float) -> float:
    saved = sum(one.saved_bytes or 0 for one in block)
    extra = sum(one.extra_seconds or 0.0 for one in block)
    return math.inf if saved <= 0 else (extra if extra > noise else 0.0) / saved


def choose(
    order: Sequence[Weighed], trial: Try, *, limit_bytes: int, base_bytes: int | None = None, known: Known | None = None
) -> Chosen:
    """Measures that together make the step fit, of this order; all of them, and the smallest peak tried, if none do.

    A set is passed over if its predicted peak, the base less what was weighed, is more than `FAR` times the limit; all
    of them together are tried whatever is predicted. What is known to go through is tried before a larger set and
    before one that is predicted not to fit, and what saves anything of it is taken as needed, if leaving out any one of
    its measures is predicted to be too much.

    Args:
        order: what `weigh` gave.
        trial: makes the step; called for each set at most once.
        limit_bytes: the most that the step may hold.
        base_bytes: what the step holds as it is, or less; None: nothing is predicted.
        known: measures that it is known to go through with.
    """
    steps = _Steps(order, trial, limit_bytes, base_bytes)
    wanted = [one.measure for one in order if known is not None and one.measure.name in known.measures]
    taken: list[Measure] = []
    smallest: Chosen | None = None
    for one in order:
        taken.append(one.measure)
        if one is not order[-1] and steps.is_hopeless(taken):
            continue
        if known is not None and (smallest is not None or steps.is_short(taken) or set(wanted) <= set(taken)):
            if (found := _as_known(wanted, known.peak_bytes, order, steps)) is not None:
                return found
            known = None
        found = Chosen(taken=tuple(taken), trial=steps.trial(taken), fits=False)
        if found.trial.fits(limit_bytes):
            return _without_needless(found, order, steps)
        if smallest is None or _peak(found) < _peak(smallest):
            smallest = found
    return smallest or Chosen(taken=(), trial=Trial(peak_bytes=None), fits=False)


class _Steps:
    """The steps of a choice: made once for each set, and predicted."""

    def __init__(self, order: Sequence[Weighed], trial: Try, limit_bytes: int, base_bytes: int | None) -> None:
        self._trial, self.limit_bytes, self._base = trial, limit_bytes, base_bytes
        self.saved = {one.measure: one.saved_bytes for one in order}
        self._made: dict[frozenset[Measure], Trial] = {frozenset(): Trial(peak_bytes=None)}
        """The caller has seen that the step as it is does not fit."""
        self._too_high = 0
        """Bytes by which a prediction was above what was then measured."""

    def trial(self, taken: Sequence[Measure]) -> Trial:
        """The step with these measures."""
        key = frozenset(taken)
        if key not in self._made:
            found = self._made[key] = self._trial(tuple(taken))
            predicted = self._predicted(taken)
            if predicted is not None and found.peak_bytes is not None:
                self._too_high = max(self._too_high, predicted - found.peak_bytes)
        return self._made[key]

    def was_made(self, taken: Sequence[Measure]) -> bool:
        """Whether the step with these measures was tried."""
        return frozenset(taken) in self._made

    def is_hopeless(self, taken: Sequence[Measure]) -> bool:
        """Whether the step with these measures is predicted to be far from fitting."""
        return self._exceeds(taken, FAR * self.limit_bytes)

    def is_short(self, taken: Sequence[Measure]) -> bool:
        """Whether the step with these measures is predicted not to fit."""
        return self._exceeds(taken, self.limit_bytes)

    def _exceeds(self, taken: Sequence[Measure], count: float) -> bool:
        predicted = self._predicted(taken)
        return predicted is not None and predicted - self._too_high > count

    def _predicted(self, taken: Sequence[Measure]) -> int | None:
        """Bytes of the base less all that the measures save alone, as if none saved what another does too.

        So it is rather too low. It is too high where measures save together what none does alone, and where a part of
        the batch is too small to show what one saves: what was measured afterwards corrects it.
        """
        saved = [self.saved[measure] for measure in taken]
        if self._base is None or None in saved:
            return None
        return self._base - sum(max(0, one or 0) for one in saved)


def _peak(chosen: Chosen) -> float:
    return math.inf if chosen.trial.peak_bytes is None else chosen.trial.peak_bytes


def _as_known(taken: Sequence[Measure], peak_bytes: int, order: Sequence[Weighed], steps: _Steps) -> Chosen | None:
    """What is known to go through, if the step with it fits, less what saves nothing and can be left out.

    None if it does not fit, if nothing was weighed, or if a smaller set is predicted to fit comfortably.

    Args:
        peak_bytes: what the step holds with it, about.
    """
    ends = [measure for measure in taken if not _is_needed(measure, taken)]
    saving = {measure for measure in taken if (steps.saved[measure] or 0) > 0}
    allowed = COMFORTABLE * steps.limit_bytes
    if not saving or any(peak_bytes + (steps.saved[one] or 0) <= allowed for one in ends if one in saving):
        return None
    found = Chosen(taken=tuple(taken), trial=steps.trial(taken), fits=False)
    return _without_needless(found, order, steps, needed=saving) if found.trial.fits(steps.limit_bytes) else None


def _without_needless(
    found: Chosen, order: Sequence[Weighed], steps: _Steps, *, needed: Collection[Measure] = ()
) -> Chosen:
    """Leave out, of what was taken, what the step fits without; the slowest first.

    The measure taken last is left out only where the step without it was passed over; what is `needed`, never.
    """
    extra = {one.measure: one.extra_seconds for one in order}
    taken, needless, best = list(found.taken), [], found.trial
    may_go = taken[:-1] if steps.was_made(taken[:-1]) else taken
    waiting = sorted((one for one in may_go if one not in needed), key=lambda measure: -_seconds(extra[measure]))
    while (measure := next((one for one in waiting if not _is_needed(one, taken)), None)) is not None:
        waiting.remove(measure)
        without = [one for one in taken if one is not measure]
        if not steps.is_hopeless(without) and (tried := steps.trial(without)).fits(steps.limit_bytes):
            taken, best = without, tried
            needless.append(measure)
    return Chosen(taken=tuple(taken), trial=best, fits=True, needless=tuple(needless))


def _seconds(extra: float | None) -> float:
    """A measure whose time is not known counts as slow."""
    return math.inf if extra is None else extra


def _is_needed(measure: Measure, taken: Sequence[Measure]) -> bool:
    """Whether another one that is taken builds on it."""
    return any(other.after == measure.name for other in taken)
