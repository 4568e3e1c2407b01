"""Multiply-adds, measured times and sizes of inputs of the units."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from deepseek_mp.backends import Capabilities
from deepseek_mp.backends.low_precision import formats_of
from deepseek_mp.costs import Candidate, CostCache, UnitCall, measure_layers, record_units
from deepseek_mp.costs.fingerprint import environment
from deepseek_mp.precision import Recipe
from deepseek_mp.precision.plan import MemoryFormat

SECONDS = 15.0
"""Time for all layers together, kernels made ready included; what is in the cache costs none of it."""


@dataclass(frozen=True, kw_only=True)
class LayerCosts:
    """By unit, over all its calls in one step."""

    macs: Mapping[str, int] = field(default_factory=dict)
    milliseconds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """By recipe, for those that the device multiplies; units that could not be timed alone are not there.

    Of the device, without what the host takes to launch: in a whole step it is ahead or it is not, for all layers.
    """
    inputs: Mapping[str, int] = field(default_factory=dict)
    """Numbers in the unit's input, which is kept for backward."""


def layer_costs(
    model: nn.Module,
    forward: Callable[[], object],
    recipes: Sequence[Recipe],
    capabilities: Capabilities,
    device: torch.device,
    *,
    timed: bool,
    progress: Callable[[float], None],
    cache: CostCache | None = None,
    budget_s: float = SECONDS,
    kernels: str | None = None,
    memory_format: MemoryFormat = "contiguous",
) -> LayerCosts:
    """What the units cost in one step of `forward`; times only where `timed`.

    `kernels` names what runs FP8, `memory_format` is that of convolutions. Without seconds to spend, what `cache` holds
    is all there is.
    """
    calls = record_units(model, forward)
    macs: dict[str, int] = {}
    inputs: dict[str, int] = {}
    for call in calls:
        for name in call.names:
            macs[name] = macs.get(name, 0) + call.macs
            inputs[name] = inputs.get(name, 0) + _numbers(call)
    times: Mapping[str, Mapping[str, float]] = {}
    if timed:
        native = [recipe for recipe in recipes if formats_of(recipe) <= capabilities.matmul_formats]
        names = dict.fromkeys(["fp32", *(recipe.name for recipe in native)])
        candidates = [Candidate(format=name, memory_format=memory_format) for name in names]
        cache = CostCache() if cache is None else cache
        found = measure_layers(
            calls,
            candidates,
            device=device,
            budget_s=budget_s,
            cache=cache,
            environment=environment(device, capabilities),
            kernels=kernels,
            progress=progress,
        )
        cache.save()
        formats = {candidate.key: candidate.format for candidate in candidates}
        rows = found.of_layers(host=False)
        times = {name: {formats[key]: ms for key, ms in row.items()} for name, row in rows.items()}
    return LayerCosts(macs=macs, milliseconds=times, inputs=inputs)


def _numbers(call: UnitCall) -> int:
    count = 1
    for size in call.inputs[0].shape:
        count *= size
    return count
