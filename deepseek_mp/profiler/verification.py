"""Is a profile right for this model? True changes of the loss beside the predicted ones, on batches held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from deepseek_mp.precision import RECIPES
from deepseek_mp.sensitivity.reading import SURE
from deepseek_mp.sensitivity.truth import losses_in

LEAST_PAIRS = 3


@dataclass(frozen=True)
class TrueChange:
    """By how much the loss changed, absolute, over batches."""

    mean: float
    standard_error: float | None
    """None for a single batch."""

    @property
    def is_plain(self) -> bool:
        """Whether it differs from zero by more than what batches scatter."""
        return self.standard_error is not None and abs(self.mean) > SURE * self.standard_error


def true_changes(
    losses: Sequence[Callable[[], Tensor]], modules: Mapping[str, nn.Module], recipes: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, TrueChange]]:
    """By unit and recipe, how the loss changes with that unit's output alone in the recipe, emulated.

    `losses` gives the loss of each batch, the same every time it is called.
    """
    cases = {(name, recipe): {modules[name]: RECIPES[recipe]} for name in modules for recipe in recipes[name]}
    keyed = {f"{name}\0{recipe}": case for (name, recipe), case in cases.items()}
    by_batch = [losses_in(loss, keyed)[1] for loss in losses]
    found: dict[str, dict[str, TrueChange]] = {}
    for (name, recipe), key in zip(cases, keyed, strict=True):
        found.setdefault(name, {})[recipe] = _over_batches([changes[key] for changes in by_batch])
    return found


def _over_batches(changes: Sequence[float]) -> TrueChange:
    count = len(changes)
    mean = math.fsum(changes) / count
    if count == 1 or not math.isfinite(mean):
        return TrueChange(mean, None)
    return TrueChange(mean, (math.fsum((change - mean) ** 2 for change in changes) / (count - 1) / count) ** 0.5)


def rank_correlation(predicted: Sequence[float], true: Sequence[float]) -> float | None:
    """Spearman's rank correlation, equal values with their mean rank; None for fewer than three pairs or no spread."""
    if len(predicted) < LEAST_PAIRS:
        return None
    a, b = _ranks(predicted), _ranks(true)
    mean = (len(a) - 1) / 2
    covariance = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    scale = (sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)) ** 0.5
    return covariance / scale if scale else None


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in order[start : end + 1]:
            ranks[place] = (start + end) / 2
        start = end + 1
    return ranks
