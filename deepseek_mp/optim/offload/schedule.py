"""The schedule of an offloaded optimizer as plain values: chunks, their order and place, the predicted time of a step.

Needs no torch. Sizes are counts of values; a chunk is measured by the bytes of its FP32 weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deepseek_mp.errors import ConfigError, explain

FP32_BYTES = 4
CHUNK_BYTES = 64 << 20
"""Default bound of a chunk: large enough that a copy runs at full bandwidth, small enough to overlap with others."""
STEP_BYTES = 28
"""Bytes that AdamW moves per value: weight, gradient and two moments read, all but the gradient written, in FP32.

Here and below, what is written without being read counts twice: a processor fetches it before it writes."""
KEEP_BYTES = 36
"""Bytes that keeping the state before a step moves per value: weight and two moments read, and written elsewhere. Done
ahead."""
CAST_BYTES = 8
"""Bytes that rounding an FP32 weight to BF16 moves: 4 read, 2 written. No cache holds a block from its step on."""
WIDENED_BYTES = 4
"""Bytes that a BF16 gradient costs which is made FP32 for a moment only: those of a block are written and read again,
and leave the cores' own caches once."""
NORM_BYTES = 4
"""Bytes that the norm of the gradients reads per value, where it is not taken as they land."""
BESIDE_BYTES = 1 << 30
"""Of the device's memory at most that 'immediate' sends weights to while backward still reads those they replace."""
BACKWARD = 2 / 3
"""Share of forward and backward that is backward: it makes two products where forward makes one."""
MODES = ("sync", "speculative", "delayed", "immediate")
WIRES = {"bf16": 2, "fp32": 4}
"""Formats that gradients are sent in, with their bytes."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Parameters that are copied and stepped together."""

    number: int
    """Place in the order of arrival: the gradients of chunk 0 are complete first."""
    members: tuple[int, ...]
    """Which parameters, by their place in the order of execution; the one that arrives first stands first."""
    values: int

    @property
    def nbytes(self) -> int:
        """Of its FP32 weights."""
        return self.values * FP32_BYTES


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which chunks are stepped on the host and which on the device."""

    host: tuple[Chunk, ...]
    device: tuple[Chunk, ...]
    freed_bytes: int
    """Of device memory, by the chunks on the host."""

    @property
    def fraction(self) -> float:
        """Share of the values whose states are on the host."""
        host, device = (sum(chunk.values for chunk in part) for part in (self.host, self.device))
        return host / (host + device) if host + device else 0.0


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What a machine moves, in bytes per second."""

    down: float
    """From the device to the host."""
    up: float
    """From the host to the device."""
    cpu: float
    """Through the host's AdamW, at `STEP_BYTES` a value."""
    keep: float | None = None
    """Through the copies of the state before a step, at `KEEP_BYTES` a value; None: as `cpu`."""
    land: float | None = None
    """Through gradients that are taken over, at `landing_bytes` a value; None: as `cpu`."""
    check: float | None = None
    """The same, with their norm; None: as `land`."""

    def __post_init__(self) -> None:
        for name in ("down", "up", "cpu", "keep", "land", "check"):
            value = getattr(self, name)
            if not (value is None and name in ("keep", "land", "check")) and not (value > 0 and math.isfinite(value)):
                raise ConfigError(explain(f"{name}={value!r} bytes/s", "positive numbers", "Measure with calibrate()"))


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one training step does besides what is offloaded, and how that is done."""

    forward_backward: float
    """Seconds on the device, all micro-batches."""
    device_step: float = 0.0
    """Seconds that the device would need to step all values."""
    micro_steps: int = 1
    """Each sends every gradient down once."""
    wire: str = "bf16"
    mode: str = "sync"
    keep: bool = True
    """Whether the state before the step is kept, so that it can be taken back; False in mode 'immediate'."""
    cast: bool = False
    """Whether the host rounds weights to BF16 before it sends them; else it sends FP32."""
    check: bool = True
    """Whether the last gradients are checked for numbers that are not finite, by a norm taken as they land; not in mode
    'immediate', nor where they are clipped."""
    clip: bool = False
    """Whether gradients are clipped by their norm, which is taken when all are there then."""

    def __post_init__(self) -> None:
        check_member("mode", self.mode, MODES)
        check_member("wire", self.wire, tuple(WIRES))
        if self.mode == "immediate" and (self.keep or self.clip):
            passed = f"mode='immediate' with keep={self.keep} and clip={self.clip}"
            raise ConfigError(explain(passed, "keep=False, clip=False", "Pass these, or take 'speculative'"))


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The parts of a predicted step, in seconds."""

    device: float
    """Forward, backward and the step of what stays on the device."""
    down: float
    host: float
    """All that the host does: gradients added up, their norm, the state kept, the step."""
    tail: float
    """What nothing hides."""
    total: float
    after: float
    """How long weights are still on their way up when the step has ended, beside the next forward."""

    @property
    def bound(self) -> str:
        """Which of 'device', 'down' and 'host' takes longest."""
        return max(("device", "down", "host"), key=lambda name: float(getattr(self, name)))


def chunks(sizes: Sequence[int], *, limit_bytes: int = CHUNK_BYTES) -> tuple[Chunk, ...]:
    """Group parameters into chunks, in the order in which backward completes their gradients.

    Args:
        sizes: values of each parameter, in the order of execution in forward.
        limit_bytes: bound of a chunk's FP32 weights; a parameter that is larger is a chunk of its own.

    Raises:
        ConfigError: a limit that holds no value.
    """
    if limit_bytes < FP32_BYTES:
        passed = f"chunk_bytes={limit_bytes}"
        raise ConfigError(explain(passed, f"{FP32_BYTES} bytes or more", f"Take the default, {CHUNK_BYTES}"))
    groups: list[list[int]] = []
    filled = 0
    for member in reversed(range(len(sizes))):
        needed = sizes[member] * FP32_BYTES
        if not groups or filled + needed > limit_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(member)
        filled += needed
    return tuple(
        Chunk(number=number, members=tuple(members), values=sum(sizes[member] for member in members))
        for number, members in enumerate(groups)
    )


def split(parts: Sequence[Chunk], *, free_bytes: int | None, bytes_per_value: int) -> Split:
    """Offload as many chunks as free the bytes wanted, those whose gradients arrive first before others.

    They have the rest of backward to be hidden in; what arrives last would be waited for.

    Args:
        parts: in the order of arrival.
        free_bytes: of device memory; None offloads everything.
        bytes_per_value: that a value occupies on the device while it is not offloaded, and not afterwards.

    Raises:
        ConfigError: more than all chunks would free, or a negative number.
    """
    possible = sum(chunk.values for chunk in parts) * bytes_per_value
    if free_bytes is None:
        return Split(host=tuple(parts), device=(), freed_bytes=possible)
    if not 0 <= free_bytes <= possible:
        passed = f"free_bytes={free_bytes}"
        change = "Free less, or shard the model: weights stay on the device"
        raise ConfigError(explain(passed, f"0 to {possible}, which all chunks would free", change))
    freed = taken = 0
    while freed < free_bytes:
        freed += parts[taken].values * bytes_per_value
        taken += 1
    return Split(host=tuple(parts[:taken]), device=tuple(parts[taken:]), freed_bytes=freed)


def cast_on_host(rates: Rates) -> bool:
    """Whether the host should round BF16 weights before it sends them; else it sends FP32 and the device rounds.

    The host's step and the copies up overlap, so the slower of the two counts: rounding loads the host with
    `CAST_BYTES` a value and saves half of the wire's.
    """
    host = max((STEP_BYTES + CAST_BYTES) / rates.cpu, WIRES["bf16"] / rates.up)
    return host <= max(STEP_BYTES / rates.cpu, FP32_BYTES / rates.up)


def host_bytes(work: Work) -> float:
    """Bytes per value that the host moves in its memory for one step, without adding up earlier micro-batches."""
    only = replace(work, micro_steps=1)
    return _arrival_bytes(only) + NORM_BYTES * work.clip + KEEP_BYTES * work.keep + _step_bytes(only)


def landing_bytes(wire: int, *, first: bool = True) -> float:
    """Bytes per value to take over a gradient that has arrived, or to add it to those before.

    Args:
        wire: bytes of a value that arrives.
        first: whether there is none before; then FP32 is only written, but fetched all the same.
    """
    return wire + 2 * FP32_BYTES + (WIDENED_BYTES if wire < FP32_BYTES and not first else 0)


def _arrival_bytes(work: Work) -> float:
    """Of the last micro-batch's gradients. In 'immediate' they are added up within the step, in a cache."""
    wire, first = WIRES[work.wire], work.micro_steps == 1
    if work.mode != "immediate":
        return landing_bytes(wire, first=first)
    return wire + (0 if first else FP32_BYTES) + (WIDENED_BYTES if wire < FP32_BYTES else 0)


def _landing_rate(rates: Rates, work: Work) -> float:
    """Of the last micro-batch's gradients. In 'immediate' they are a part of the step."""
    if work.mode == "immediate":
        return rates.cpu
    land = rates.land or rates.cpu
    return (rates.check or land) if work.check and not work.clip else land


def _step_bytes(work: Work) -> float:
    return STEP_BYTES + CAST_BYTES * work.cast - (FP32_BYTES if work.mode == "immediate" else 0)


def predict(placed: Split, rates: Rates, work: Work) -> Prediction:
    """The time of a step among others: what is longest in each part of the window, and then what nothing hides.

    Gradients go down and are added up beside backward; those of earlier micro-batches also beside the next forward. The
    state before the step is kept beside both, as far as there is time. In 'sync' the host's step begins when the
    gradients' norm is known, after backward, so it is in the tail. In 'speculative' and 'immediate' it runs beside the
    last backward, in 'delayed' beside the whole next window. What the chunk that arrives last needs then follows
    backward, unless the host has more to do anyway. Weights go up behind backward, beside the rest of the host's step
    and the next forward; the last chunk's way is in the tail.

    In 'immediate' weights go up beside backward, too, as far as the device has memory beside them, and what stays on
    the device is stepped meanwhile. Its layers come first in forward, which needs the others only after them, and first
    the chunk whose gradients arrive last. Of the chunks that are there the host steps the one that forward needs first:
    what it steps last, forward reads last, and only the layers behind that are not hidden.

    The host's work is taken as bytes moved at the rates of its parts, as all of it is bound by memory.
    """
    values = sum(chunk.values for chunk in placed.host)
    last = placed.host[-1].values if placed.host else 0
    wire, land = WIRES[work.wire], rates.land or rates.cpu
    landing = _arrival_bytes(work) / _landing_rate(rates, work)
    norm = NORM_BYTES * work.clip / rates.cpu
    stepping = _step_bytes(work) / rates.cpu
    keeping = KEEP_BYTES * work.keep / (rates.keep or rates.cpu)
    down = values * wire / rates.down
    micro = work.forward_backward / work.micro_steps
    forward = (1 - BACKWARD) * micro
    on_device = (1 - placed.fraction) * work.device_step
    up = (WIRES["bf16"] if work.cast else FP32_BYTES) / rates.up
    before = [landing_bytes(wire, first=not number) / land for number in range(work.micro_steps - 1)]
    begun = sum(max(micro, down, values * each) for each in before) + forward
    is_early = work.mode in ("speculative", "immediate")
    beside = landing + stepping * is_early
    adding = values * (sum(before) + landing)
    busy = adding + values * (keeping + (0.0 if work.mode == "sync" else stepping))
    ways = placed.fraction if work.mode == "immediate" else 1.0
    arrived = begun + max(BACKWARD * micro * ways, down) + last * (wire / rates.down + beside)
    hidden = max(arrived, begun + values * beside, busy)
    tail = last * up + values * (norm + stepping * (work.mode == "sync"))
    sent = work.forward_backward + values * up
    if work.mode != "immediate":
        total = max(hidden + tail, sent - forward) + on_device
    else:
        # What forward reads last: the first that arrives, and the next, which may have to wait for it.
        sizes = [chunk.values for chunk in placed.host[:2]] or [0]
        way = placed.fraction / max(values, 1)
        begin = begun + sizes[0] * (BACKWARD * micro * way + wire / rates.down)
        at_end = begin + values * beside + sizes[-1] * up
        in_order = max(at_end, begin + sizes[0] * beside + values * up)
        first = max(arrived + tail, work.forward_backward + max(values - BESIDE_BYTES / wire, 0.0) * up)
        total = max(
            work.forward_backward + on_device,
            busy,
            first - (1 - placed.fraction) * forward,
            in_order - (1 - sum(sizes) * way) * forward,
        )
        sent = max(first, in_order)
    return Prediction(
        device=work.forward_backward + on_device,
        down=work.micro_steps * down,
        host=adding + values * (norm + keeping + stepping),
        tail=tail,
        total=total,
        after=max(sent - total, 0.0),
    )


def check_member(name: str, value: str, allowed: Sequence[str]) -> None:
    """`ConfigError` unless the value is one of those allowed."""
    if value not in allowed:
        raise ConfigError(explain(f"{name}={value!r}", ", ".join(map(repr, allowed)), f"Choose the {name} from these"))
