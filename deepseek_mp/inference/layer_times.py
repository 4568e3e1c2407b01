"""The time of a linear layer alone, in 16 bits and in other kinds, for the rows that it sees: each shape once.

In a model the weights of all other layers are read between two calls of one. So before each call as much memory is
read as the model's layers have, up to `COLD`, and then the inputs, which the layer before has just written. On devices
with events calls are timed on the device's own queue, behind a pause in which the host issues all of them: that is what
a layer takes in a compiled or recorded model, where the host is ahead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.backends import synchronize
from deepseek_mp.costs.timing import CYCLES, HOLD, current_device
from deepseek_mp.errors import first_line
from deepseek_mp.inference.arithmetic import arithmetic
from deepseek_mp.inference.linear_kinds import KINDS
from deepseek_mp.inference.quantised_linear import QuantisedLinear
from deepseek_mp.nn.nested import first_tensor

COLD = 2**28
"""Bytes: more than caches hold."""
ROUNDS, RUNS = 4, 5
"""Visits to each kind, in turns, and calls in a visit."""

Call = Callable[[], object]


@dataclass(frozen=True)
class Shape:
    """What the time of a linear layer depends on: [rows, width] to [rows, channels]."""

    channels: int
    width: int
    rows: int
    bias: bool

    @property
    def weights(self) -> int:
        return self.channels * self.width


@dataclass(frozen=True, kw_only=True)
class LayerTime:
    """Seconds of one call."""

    plain: float
    """In 16 bits."""
    kinds: Mapping[str, float]
    problems: Mapping[str, str] = field(default_factory=dict)
    """Why the other kinds have no time."""


def recorded_shapes(layers: Mapping[str, nn.Linear], call: Call) -> dict[str, list[Shape]]:
    """What each layer is called with in one call of the model, call by call; nothing for those it does not use."""
    found: dict[str, list[Shape]] = {name: [] for name in layers}

    def see(name: str, _layer: nn.Module, *arguments: Any) -> None:
        given = first_tensor(arguments)
        if given is not None:
            channels, width = layers[name].weight.shape
            found[name].append(Shape(channels, width, given.numel() // width, layers[name].bias is not None))

    hooks = [
        layer.register_forward_pre_hook(partial(see, name), with_kwargs=True) for name, layer in layers.items()
    ]  # fmt: skip
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def layer_times(
    shapes: Mapping[Shape, Sequence[str]],
    dtype: torch.dtype,
    device: torch.device,
    *,
    seconds: float,
    others: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Shape, LayerTime]:
    """The time of each shape in 16 bits and in the kinds named for it, on random weights.

    Args:
        shapes: the kinds of each, the shapes in the order in which they are timed.
        seconds: when these are used up no other shape is begun, and one that was has one visit for each kind left.
        others: bytes that the model reads between two calls of a layer.
    """
    started = clock()
    found = {}
    read = torch.ones(min(others, COLD) // 4, device=device)  # zeros may be one page of memory, mapped many times
    with torch.no_grad(), arithmetic(device), current_device(device):
        for shape, kinds in shapes.items():
            if clock() - started >= seconds:
                break
            found[shape] = _time_of(shape, kinds, dtype, device, read, lambda: clock() - started < seconds, clock)
    return found


def _time_of(
    shape: Shape,
    kinds: Sequence[str],
    dtype: torch.dtype,
    device: torch.device,
    read: Tensor,
    goes_on: Callable[[], bool],
    clock: Callable[[], float],
) -> LayerTime:
    x, layers, problems = _made(shape, kinds, dtype, device)
    calls = {name: partial(layer, x) for name, layer in layers.items()}

    def before() -> None:
        read.sum()
        x.add_(0)

    pauses = {}
    for name, call in list(calls.items()):
        try:
            _laps(call, before, device, 0.0, clock)
            pauses[name] = _laps(call, before, device, 0.0, clock)[1]
        except Exception as error:
            if not name:
                raise
            problems[name] = first_line(error)
            del calls[name]
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS):
        if number and not goes_on():
            break
        for name in list(calls)[:: 1 if number % 2 == 0 else -1]:
            samples[name] += _laps(calls[name], before, device, HOLD * pauses[name], clock)[0]
    medians = {name: median(taken) for name, taken in samples.items()}
    return LayerTime(plain=medians.pop(""), kinds=medians, problems=problems)


def _made(
    shape: Shape, kinds: Sequence[str], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, dict[str, nn.Module], dict[str, str]]:
    """Inputs, a layer in 16 bits under '' and one of each kind that is fast there, and why the others are not."""
    generator = torch.Generator(device=device).manual_seed(0)
    weight = torch.randn(shape.channels, shape.width, generator=generator, device=device)
    x = torch.randn(shape.rows, shape.width, generator=generator, device=device).to(dtype)
    plain = nn.utils.skip_init(nn.Linear, shape.width, shape.channels, bias=shape.bias, device=device, dtype=dtype)
    plain.weight.copy_(weight)
    if shape.bias:
        plain.bias.zero_()
    layers: dict[str, nn.Module] = {"": plain}
    slow = {}
    for kind in kinds:
        if KINDS[kind].fastest(device, dtype, shape.channels, shape.width) is None:
            slow[kind] = "the device has no such product of its size"
        else:
            layers[kind] = QuantisedLinear(KINDS[kind].keep(weight, "a weight"), plain.bias, kind, dtype)
    return x, layers, slow


def _laps(
    call: Call, before: Call, device: torch.device, pause_s: float, clock: Callable[[], float]
) -> tuple[list[float], float]:
    """Seconds of each of `RUNS` calls, and how long the host took to issue them all."""
    module: Any = None if device.type == "cpu" else torch.get_device_module(device)
    event = getattr(module, "Event", None)
    if event is None:
        taken = []
        for _ in range(RUNS):
            before()
            synchronize(device)
            started = clock()
            call()
            synchronize(device)
            taken.append(clock() - started)
        return taken, 0.0
    synchronize(device)
    marks = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(RUNS)]
    pause = getattr(module, "_sleep", None)
    if pause is not None and pause_s > 0:
        pause(round(CYCLES * pause_s))
    started = clock()
    for start, end in marks:
        before()
        start.record()
        call()
        end.record()
    issued = clock() - started
    synchronize(device)
    return [1e-3 * float(start.elapsed_time(end)) for start, end in marks], issued
