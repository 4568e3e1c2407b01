"""The guard against outliers that grow in the input of a lowered layer.

Their growth foretells trouble, as the FOG recipes of FP8 training found. It counts only where it does harm: activations
that grow sparse, as they do in healthy training, have as large a kurtosis.
"""

from __future__ import annotations

from typing import Any

from deepseek_mp.controller.adaptive_units import UnitState

KURTOSIS_GROWTH = 4.0
"""Growth of an input's kurtosis since its layer was lowered, above which outliers count as grown."""
GRAVE = 5.0
"""Budgets of the loss that a layer costs in one probe, above which nothing waits for the next one."""


def grown(state: UnitState, kurtosis: float) -> dict[str, Any]:
    """Evidence that the outliers in the input of a lowered layer grew; empty where they did not."""
    if state.kurtosis is None:
        state.kurtosis = kurtosis  # lowered before anything was measured
    if not state.kurtosis or kurtosis <= KURTOSIS_GROWTH * state.kurtosis:
        return {}
    return {"guard": "kurtosis", "kurtosis": kurtosis, "when_lowered": state.kurtosis}


def do_harm(state: UnitState, cost: float, budget: float, *, are_grown: bool) -> bool:
    """Whether grown outliers do harm: the layer alone costs the whole budget of the loss, in two probes in a row.

    Args:
        state: which keeps what this probe says for the next one.
        cost: of the layer in this probe, the rise of the loss.
        budget: of all layers.
        are_grown: whether the outliers are.
    """
    seem_so = are_grown and cost > budget
    do_so = seem_so and (state.suspected or cost > GRAVE * budget)
    state.suspected = seem_so and not do_so
    return do_so
