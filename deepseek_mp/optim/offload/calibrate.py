"""Measures what the schedule is computed from: copies both ways, and the host's work, in two seconds or little more."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import nn

from deepseek_mp.optim.offload.arena import allocate
from deepseek_mp.optim.offload.host_chunk import HostChunk, Member, Memory
from deepseek_mp.optim.offload.in_turn import UnderWay, in_turn
from deepseek_mp.optim.offload.lanes import DirectLanes, Lanes, lanes_for
from deepseek_mp.optim.offload.schedule import (
    CHUNK_BYTES,
    FP32_BYTES,
    KEEP_BYTES,
    STEP_BYTES,
    WIRES,
    Rates,
    landing_bytes,
)
from deepseek_mp.optim.offload.verdict import AS_IT_IS

VALUES = 1 << 22
"""Of a copy: long enough for full bandwidth."""
STEP_VALUES = CHUNK_BYTES // FP32_BYTES
"""Of a chunk that the host steps: as many as in training."""
CHUNKS = 5
"""That the host works on in turn, with 2.5 GB in all: what is worked on again has left any cache meanwhile."""
BYTES = 7 * FP32_BYTES + 2
"""Of a value: weight, two moments, gradient, and what is kept of them, in FP32, and a BF16 gradient as it arrives."""
_OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


@torch.no_grad()
def calibrate(
    device: torch.device | str,
    *,
    seconds: float = 2.0,
    values: int = VALUES,
    step_values: int = STEP_VALUES,
    lanes: Callable[[torch.device], Lanes] = lanes_for,
    clock: Callable[[], float] = time.perf_counter,
) -> Rates:
    """The rates of a device and this machine's processors, by the threads that PyTorch uses now.

    On a CPU the same code measures copies within its memory.

    Args:
        device: that the model is on.
        seconds: for everything: a quarter for each way of copies, the rest for the host, whose memory is written for
            the first time in a part of it. Each rate is measured at least once.
        values: fp32, of a copy.
        step_values: of each of the chunks that the host steps in turn; they are fewer where time is up.
        lanes: makes the copies of a device.
        clock: in seconds.
    """
    begun = clock()
    where = torch.device(device)
    copies = lanes(where)
    host = allocate(values, torch.float32, pin=where.type != "cpu").flat
    there = torch.zeros(values, device=where)

    def down() -> None:
        copies.land(copies.down(host, there))

    def up() -> None:
        copies.land(copies.up([there], [host]))

    end = max(seconds - (clock() - begun), 0.0) / 4
    sent, received = typical(down, end, clock), typical(up, end, clock)
    work = HostWork(step_values, clock)
    work.grow(end)
    land, check, keep, step = work.typical(max(seconds - (clock() - begun), 0.0))
    landed = work.values * landing_bytes(WIRES["bf16"])
    return Rates(
        down=values * FP32_BYTES / sent,
        up=values * FP32_BYTES / received,
        cpu=work.values * STEP_BYTES / step,
        keep=work.values * KEEP_BYTES / keep,
        land=landed / land,
        check=landed / check,
    )


class HostWork:
    """What the host does for a step, by the code that trains, on chunks in turn.

    Args:
        values: of a chunk.
        clock: in seconds.
    """

    def __init__(self, values: int, clock: Callable[[], float]) -> None:
        self._of_chunk, self._clock = values, clock
        self._memory = Memory(wire=None, pin=False, undo=True, cast_on_host=False, two_gradients=False)
        self._chunks: list[HostChunk] = []
        self._states: dict[Any, dict[str, Any]] = {}
        self._lanes = DirectLanes()

    @property
    def values(self) -> int:
        """Of all chunks."""
        return sum(chunk.values for chunk in self._chunks)

    def grow(self, seconds: float) -> None:
        """Make chunks, one at least, and write their memory for the first time."""
        begun = before = self._clock()
        most, longest = min(CHUNKS, _bearable(self._of_chunk)), 0.0
        while not self._chunks or (len(self._chunks) < most and before - begun + longest <= seconds):
            parameter = nn.Parameter(torch.empty(self._of_chunk, dtype=torch.bfloat16))
            chunk = HostChunk(len(self._chunks), [Member(parameter=parameter, group=0)], self._memory)
            for slot in chunk.slots:
                slot.wire.fill_(1e-3)  # what was never written is the same zeros everywhere, and in a cache
            self._chunks.append(chunk)
            self._round([chunk])
            now = self._clock()
            longest, before = max(longest, now - before), now

    def typical(self, seconds: float) -> tuple[float, ...]:
        """Medians of the times to land gradients, to land them with their norm, to keep the state and to step.

        Each of all chunks. The first round, in which threads wake up, is not counted, unless time is up after it.
        """
        begun = before = self._clock()
        rounds: list[tuple[float, ...]] = []
        longest = 0.0
        while not rounds or before - begun + longest <= seconds:
            rounds.append(self._round(self._chunks))
            now = self._clock()
            longest, before = max(longest, now - before), now
        return tuple(median(times) for times in zip(*(rounds[1:] or rounds), strict=True))

    def _round(self, chunks: list[HostChunk]) -> tuple[float, ...]:
        times = [self._clock()]
        for action in (self._land, partial(self._land, measure=True), self._keep, self._step):
            action(chunks)
            times.append(self._clock())
        return tuple(end - start for start, end in pairwise(times))

    def _land(self, chunks: list[HostChunk], *, measure: bool = False) -> None:
        for chunk in chunks:
            for slot in chunk.slots:
                slot.master.grad, slot.pending = None, True
            chunk.land(self._lanes, measure=measure)

    def _keep(self, chunks: list[HostChunk]) -> None:
        for job in [chunk.keep_ahead() for chunk in chunks]:
            job.end()

    def _step(self, chunks: list[HostChunk]) -> None:
        def begin(chunk: HostChunk) -> UnderWay:
            return chunk.begin([_OPTIONS], self._states, chunk.gradients(), AS_IT_IS)

        in_turn(chunks, begin, _nothing, self._memory.crew)


def _bearable(values: int) -> int:
    """Chunks that take a sixteenth of the machine's memory."""
    if not hasattr(os, "sysconf"):
        return CHUNKS
    return int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // (16 * BYTES * values))


def _nothing(_chunk: HostChunk) -> None:
    """A chunk that is done needs no looking after."""


def typical(action: Callable[[], None], seconds: float, clock: Callable[[], float]) -> float:
    """Median time of an action, repeated for so long. The first time is not counted, unless time is up after it."""
    start = before = clock()
    times: list[float] = []
    while True:
        action()
        now = clock()
        times.append(now - before)
        # The next one should end in time too.
        if now - start + max(times) > seconds:
            return median(times[1:] or times)
        before = now
