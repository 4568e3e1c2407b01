"""What kinds of linear layers save in each layer of a model, by the times of their shapes (`layer_times`).

One call of the copy in 16 bits tells how many rows each layer sees. Each distinct shape is timed once in each kind. A
kind counts in a layer where it is faster by a factor of `PAYS`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deepseek_mp.inference.layer_errors import undone
from deepseek_mp.inference.layer_times import LayerTime, Shape, layer_times, recorded_shapes
from deepseek_mp.inference.quantised_linear import linear_layers
from deepseek_mp.precision.planning import PAYS

Shapes = Mapping[str, list[Shape]]
"""By layer, call by call."""
Offered = Mapping[str, Mapping[str, nn.Linear]]
"""By kind and name, the layers that can be of it."""


@dataclass(frozen=True, kw_only=True)
class LayerSavings:
    """Times of layers, before anything is known of the outputs."""

    layers: tuple[str, ...]
    """Those that can be of some kind, in the order of the model."""
    saved: Mapping[str, Mapping[str, float]]
    """Seconds of a call of the model by layer and kind, where a kind is faster."""
    left: Mapping[str, str]
    """Why other layers have none."""
    share: Mapping[str, float]
    """By kind, the time of all its layers together over theirs in 16 bits; only of kinds in which all were timed."""
    seconds: float
    """That the timing took."""


def layer_savings(
    base: nn.Module,
    call: Callable[[], Any],
    kinds: list[str],
    *,
    dtype: torch.dtype,
    device: torch.device,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> LayerSavings:
    """The savings in the model's large linear layers. Nothing is changed.

    Args:
        base: the model's copy in 16 bits.
        call: runs it on the example inputs.
        kinds: of `LINEAR_KINDS`.
        dtype: of the activations.
        seconds: when these are used up no other shape is begun.
        clock: in seconds.
    """
    started = clock()
    offered = {kind: linear_layers(base, kind)[0] for kind in kinds}
    layers = {name: layer for found in offered.values() for name, layer in found.items()}
    with undone(base, device):
        shapes = recorded_shapes(layers, call)
    wanted, read = _wanted(shapes, offered, dtype)
    times = layer_times(wanted, dtype, device, seconds=seconds, others=read, clock=clock)
    saved, left = _savings(shapes, offered, times)
    share = {kind: found for kind in kinds if (found := _share(kind, shapes, offered, times)) is not None}
    return LayerSavings(layers=tuple(layers), saved=saved, left=left, share=share, seconds=clock() - started)


def _wanted(shapes: Shapes, offered: Offered, dtype: torch.dtype) -> tuple[dict[Shape, list[str]], int]:
    """The kinds that each shape is timed in, those with most weights in the model first; and the bytes of a call."""
    kinds: dict[Shape, list[str]] = {}
    weights: dict[Shape, int] = {}
    for name, calls in shapes.items():
        for shape in calls:
            weights[shape] = weights.get(shape, 0) + shape.weights
            some = kinds.setdefault(shape, [])
            some += [kind for kind in offered if name in offered[kind] and kind not in some]
    read = sum(calls[0].weights for calls in shapes.values() if calls) * dtype.itemsize
    return {shape: kinds[shape] for shape in sorted(kinds, key=lambda shape: -weights[shape])}, read


def _savings(
    shapes: Shapes, offered: Offered, times: Mapping[Shape, LayerTime]
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    saved, left = {}, {}
    for name, calls in shapes.items():
        if not calls or not all(shape in times for shape in calls):
            left[name] = "the time to measure was up" if calls else "not called with these inputs"
            continue
        plain = math.fsum(times[shape].plain for shape in calls)
        own = {
            kind: math.fsum(times[shape].kinds[kind] for shape in calls)
            for kind in offered
            if name in offered[kind] and all(kind in times[shape].kinds for shape in calls)
        }
        faster = {kind: plain - seconds for kind, seconds in own.items() if seconds * PAYS < plain}
        if faster:
            saved[name] = faster
        else:
            problems = [f"{kind}: {why}" for shape in calls for kind, why in times[shape].problems.items()]
            left[name] = "no kind is faster" if own else "; ".join(dict.fromkeys(problems))
    return saved, left


def _share(kind: str, shapes: Shapes, offered: Offered, times: Mapping[Shape, LayerTime]) -> float | None:
    """None where a layer of the kind was not timed, or none is called."""
    calls = [shape for name in offered[kind] for shape in shapes[name]]
    if not calls or not all(shape in times and kind in times[shape].kinds for shape in calls):
        return None
    return math.fsum(times[shape].kinds[kind] for shape in calls) / math.fsum(times[shape].plain for shape in calls)
