"""Measures what the schedule is computed from: copies both ways and the host's step, in two seconds at most."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn

from deepseek_mp.optim.offload.arena import allocate
from deepseek_mp.optim.offload.host_chunk import HostChunk, Member, Memory
from deepseek_mp.optim.offload.lanes import Lanes, lanes_for
from deepseek_mp.optim.offload.schedule import CAST_BYTES, FP32_BYTES, KEEP_BYTES, STEP_BYTES, Rates
from deepseek_mp.optim.offload.verdict import AS_IT_IS

VALUES = 1 << 22
"""Of a copy: long enough for full bandwidth."""
STEP_VALUES = 1 << 24
"""Of a step: half a gigabyte with all that belongs to them, which no cache holds."""
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
        seconds: for everything; each rate takes at most a quarter, but is measured at least once.
        values: fp32, of a copy.
        step_values: of a step of the host, which rounds to BF16.
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
    plain, kept = (typical(_host_step(step_values, keep=keep), end, clock) for keep in (False, True))
    return Rates(
        down=values * FP32_BYTES / sent,
        up=values * FP32_BYTES / received,
        cpu=step_values * (STEP_BYTES + CAST_BYTES) / plain,
        keep=step_values * KEEP_BYTES / (kept - plain) if kept > plain else None,
    )


def _host_step(values: int, *, keep: bool) -> Callable[[], None]:
    """The step of one chunk, by the code that trains."""
    memory = Memory(wire=None, pin=False, undo=keep, cast_on_host=True, two_gradients=False)
    member = Member(parameter=nn.Parameter(torch.zeros(values, dtype=torch.bfloat16)), group=0)
    chunk = HostChunk(0, [member], memory)
    states: dict[Any, dict[str, Any]] = {}
    for slot in chunk.slots:
        slot.master.grad = slot.total.fill_(1e-3)
    return lambda: chunk.step([_OPTIONS], states, chunk.gradients(), AS_IT_IS)


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
