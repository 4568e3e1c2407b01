"""Measures what the schedule is computed from: copies both ways and the host's AdamW, in two seconds at most."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn

from deepseek_mp.optim.offload import rule
from deepseek_mp.optim.offload.arena import allocate
from deepseek_mp.optim.offload.lanes import Lanes, lanes_for
from deepseek_mp.optim.offload.schedule import FP32_BYTES, STEP_BYTES, Rates

VALUES = 1 << 22
"""Of a copy and of a step: beyond most caches, and short enough to be repeated."""
_OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


@torch.no_grad()
def calibrate(
    device: torch.device | str,
    *,
    seconds: float = 2.0,
    values: int = VALUES,
    lanes: Callable[[torch.device], Lanes] = lanes_for,
    clock: Callable[[], float] = time.perf_counter,
) -> Rates:
    """The rates of a device and this machine's processors, by the threads that PyTorch uses now.

    On a CPU the same code measures copies within its memory.

    Args:
        device: that the model is on.
        seconds: for everything; each rate takes at most a third, but is measured at least once.
        values: fp32, of a copy and of a step.
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

    master = nn.Parameter(torch.zeros(values))
    state = rule.new_state([torch.zeros(values), torch.zeros(values)])
    gradient = torch.full((values,), 1e-3)

    def step() -> None:
        rule.step(_OPTIONS, [master], [gradient], [state])

    end = max(seconds - (clock() - begun), 0.0) / 3
    return Rates(
        down=values * FP32_BYTES / typical(down, end, clock),
        up=values * FP32_BYTES / typical(up, end, clock),
        cpu=values * STEP_BYTES / typical(step, end, clock),
    )


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
