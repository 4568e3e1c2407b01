"""Chooses a kind for each large linear layer of a served model: most time saved within the budget, by measurement.

1. What kinds save in each layer is measured before (`layer_savings`).
2. What a kind does to the outputs is measured with all layers of equal role (the name without its numbers) in it and
   everything else in 16 bits: one call for each role and kind, however deep the model is. That is enough where each
   role gets the kind that saves it most. Otherwise layers are chosen one by one, each with an equal share of its role's
   error at first. In roles where some do not get the kind that saves them most, those kinds are then measured layer by
   layer, and the choice is made again.
3. The solver of training (`precision.allocate`) takes the kinds that save most while the errors add up to the budget.
   KL grows with the square of a small disturbance, so independent ones add; of `relative` the squares are added. A
   metric of your own is added as it is.
4. Errors add up only roughly. So the whole is measured, and layers taken back, those of most error for the time they
   save first, until it is within `MARGIN` of the budget: compiled code rounds at other places than what is measured.

When the time is used up nothing new is begun. What was not timed or measured stays in 16 bits. Only the last step has
no limit but its number of rounds, the logarithm of that of the layers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from deepseek_mp.errors import ConfigError
from deepseek_mp.inference.fidelity import Metric, relative
from deepseek_mp.inference.layer_choice import Part, apart, better, by_role, chosen, taken_back
from deepseek_mp.inference.layer_errors import LayerErrors
from deepseek_mp.inference.layer_plan import LayerChoice, LayerPlan
from deepseek_mp.inference.layer_savings import LayerSavings

MARGIN = 0.9
"""Of the budget, for what is measured here."""
FEWEST = 2
"""Layers, below which one kind for all is the same choice."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What kinds are measured on: the model, and its copy in 16 bits with layers of the same names."""

    model: nn.Module
    base: nn.Module
    call: Callable[[], Any]
    """Gives the outputs of what `base` holds, for the example inputs."""
    reference: Any
    """What they are measured against."""
    metric: Metric
    dtype: torch.dtype
    """Of the activations."""
    device: torch.device

    def amount(self, error: float) -> float:
        """What of an error adds up over layers."""
        return error * error if self.metric is relative else error


def by_layer(
    bench: Bench,
    savings: LayerSavings,
    *,
    budget: float,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> LayerPlan:
    """The kinds of the model's large linear layers, one by one, with the reason of each. Nothing is changed.

    Args:
        savings: of the kinds that may be chosen.
        budget: the largest metric allowed.
        seconds: for measuring outputs, but for the last check and what was begun before.
        clock: in seconds.
    """
    if len(savings.layers) < FEWEST:
        return LayerPlan(why=f"not tried: fewer than {FEWEST} linear layers can be of another kind")
    layers, left, started = savings.layers, savings.left, clock()
    if not savings.saved:
        return LayerPlan(why="no kind is faster than 16 bits in any layer", choices=_choices(layers, {}, [], left))
    search = _Search(bench, budget, lambda: clock() - started < seconds)
    if search.limit <= 0:
        return LayerPlan(why=f"16 bits alone take {search.plain:.3g} of the budget of {budget:g}, nothing is left")
    parts, kinds_of = search.run(savings.saved)
    plan = LayerPlan(why="", choices=_choices(layers, kinds_of, parts, {**left, **search.reasons(parts, kinds_of)}))
    return replace(plan, why=_summary(plan, search))


class _Search:
    """Measures parts of the model, and chooses among them."""

    def __init__(self, bench: Bench, budget: float, goes_on: Callable[[], bool]) -> None:
        self._bench, self._goes_on = bench, goes_on
        self._errors = LayerErrors(
            bench.model, bench.base, bench.call, reference=bench.reference, metric=bench.metric, dtype=bench.dtype,
            device=bench.device,
        )  # fmt: skip
        self._problems: dict[tuple[str, str], str] = {}
        self._back: set[str] = set()
        self.plain = self._errors.error({})
        self._least = bench.amount(self.plain)
        self.limit = MARGIN * bench.amount(budget) - self._least
        """What all layers may take."""
        self.rounds = 0

    @property
    def looks(self) -> int:
        return self._errors.looks

    def run(self, saved: Mapping[str, Mapping[str, float]]) -> tuple[list[Part], dict[str, str]]:
        """The parts that were chosen from, and the kinds by layer of what stood the last check."""
        roles = [self._measured(part, list(part.saved)) for part in _by_gain(by_role(saved))]
        taken = chosen(roles, self.limit)
        if not any(map(better, roles, taken)):
            return roles, self._checked(roles, taken)
        split = [apart(part) for part in roles]
        known = {index for index, part in enumerate(roles) if len(part.layers) == 1}
        while True:
            parts = [single for part in split for single in part]
            taken = chosen(parts, self.limit)
            missed = _missed(split, taken)
            if not missed.keys() - known or not self._goes_on():
                return parts, self._checked(parts, taken)
            for index in missed.keys() - known:
                split[index] = [self._measured(single, missed[index]) for single in split[index]]
                known.add(index)

    def reasons(self, parts: list[Part], kinds: Mapping[str, str]) -> dict[str, str]:
        """Why layers that could save time stay in 16 bits."""
        found = {}
        for part in parts:
            for layer in part.layers:
                if layer in self._back:
                    found[layer] = "taken back: the whole was beyond the budget"
                elif layer not in kinds:
                    found[layer] = self._why_left(part, layer)
        return found

    def _measured(self, part: Part, kinds: list[str]) -> Part:
        """The part with what these kinds take of the budget; without those that fail, or for which there is no time."""
        errors = dict(part.errors)
        for kind in sorted(kinds, key=part.gain, reverse=True):
            if kind not in part.saved or not self._goes_on():
                continue
            try:
                errors[kind] = max(0.0, self._amount(part.kinds(kind)))
                for layer in part.layers:
                    self._problems.pop((layer, kind), None)
            except (ConfigError, RuntimeError, MemoryError) as error:
                errors.pop(kind, None)
                for layer in part.layers:
                    self._problems[layer, kind] = str(error).splitlines()[0][:200]
        return replace(part, errors=errors)

    def _amount(self, kinds: Mapping[str, str]) -> float:
        return self._bench.amount(self._errors.error(kinds)) - self._least

    def _checked(self, parts: list[Part], taken: list[str | None]) -> dict[str, str]:
        """What is left of the choice when the whole is within the limit."""
        pairs = [(part, kind) for part, kind in zip(parts, taken, strict=True) if kind is not None]
        kinds = {layer: kind for part, kind in pairs for layer in part.saved[kind]}
        errors = {layer: part.share(kind) for part, kind in pairs for layer in part.saved[kind]}
        saved = {layer: seconds for part, kind in pairs for layer, seconds in part.saved[kind].items()}
        while kinds and (found := self._amount(kinds)) > self.limit:
            back = taken_back(
                {layer: errors[layer] for layer in kinds}, saved, found, self.limit, least=2**self.rounds
            )  # fmt: skip
            kinds = {layer: kind for layer, kind in kinds.items() if layer not in back}
            self._back |= back
            self.rounds += 1
        return kinds

    def _why_left(self, part: Part, layer: str) -> str:
        kinds = [kind for kind in part.saved if layer in part.saved[kind]]
        best = max(kinds, key=lambda kind: part.saved[kind][layer])
        problem = self._problems.get((layer, best))
        if problem is not None:
            return f"{best}: {problem}"
        if best not in part.errors:
            return f"{best} would be faster, but the time to measure was up"
        return f"{best} would be faster, but takes too much of the budget"


def _missed(split: list[list[Part]], taken: list[str | None]) -> dict[int, list[str]]:
    """By role in which a layer did not get the kind that saves it most: the kinds that would save some of them more."""
    found: dict[int, list[str]] = {}
    kinds = iter(taken)
    for index, singles in enumerate(split):
        some = [kind for single in singles for kind in better(single, next(kinds))]
        if some:
            found[index] = list(dict.fromkeys(some))
    return found


def _by_gain(parts: list[Part]) -> list[Part]:
    """Those with most time to win first."""
    return sorted(parts, key=lambda part: -max(part.gain(kind) for kind in part.saved))


def _choices(
    layers: Sequence[str], kinds: Mapping[str, str], parts: list[Part], left: Mapping[str, str]
) -> tuple[LayerChoice, ...]:
    """In the order of the layers, with the numbers of the kind, or of the fastest where none was taken."""
    of = {layer: part for part in parts for layer in part.layers}
    found = []
    for layer in layers:
        kind, part = kinds.get(layer), of.get(layer)
        choice = LayerChoice(layer=layer, kind=kind, why=left.get(layer, "faster, within the budget"))
        if part is not None:
            some = [name for name in part.saved if layer in part.saved[name]]
            shown = kind or max(some, key=lambda name: part.saved[name][layer])
            error = part.share(shown) if shown in part.errors else math.inf
            known = error if math.isfinite(error) else None
            choice = replace(choice, saved_us=1e6 * part.saved[shown][layer], error=known)
        found.append(choice)
    return tuple(found)


def _summary(plan: LayerPlan, search: _Search) -> str:
    taken = [choice for choice in plan.choices if choice.kind is not None]
    if not taken:
        return f"no kind of any layer is within the budget; {search.looks} looks at the outputs"
    saved = math.fsum(choice.saved_us or 0.0 for choice in taken)
    back = f", {search.rounds} times some taken back" if search.rounds else ""
    words = f"{len(taken)} of {len(plan.choices)} layers, {saved:.4g} µs less in the layers alone"
    return f"{words}; {search.looks} looks at the outputs{back}"
