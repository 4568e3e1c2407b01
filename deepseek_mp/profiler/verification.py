"""Is a profile right for this model? True changes of the loss beside the predicted ones, on a batch held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from deepseek_mp.precision import RECIPES
from deepseek_mp.sensitivity.truth import losses_in

LEAST_PAIRS = 3


def true_changes(
    loss_of: Callable[[], Tensor], modules: Mapping[str, nn.Module], recipes: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """By unit and recipe, how the loss changes with that unit's output alone in the recipe, emulated."""
    cases = {(name, recipe): {modules[name]: RECIPES[recipe]} for name in modules for recipe in recipes[name]}
    keyed = {f"{name}\0{recipe}": case for (name, recipe), case in cases.items()}
    _, changes = losses_in(loss_of, keyed)
    found: dict[str, dict[str, float]] = {}
    for (name, recipe), change in zip(cases, changes.values(), strict=True):
        found.setdefault(name, {})[recipe] = change
    return found


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
