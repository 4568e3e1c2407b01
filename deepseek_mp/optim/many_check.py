"""Whether parameters that are stepped together get the bits that they get one by one: tried once on a device.

A kernel that reads addresses from tables rests on more than one that is given tensors: on a compiler's and a driver's
view of memory. A wrong one would spoil a model without a word, so that it is compared before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor, nn

from deepseek_mp.ops.choose import kernel_runs
from deepseek_mp.optim.stored import StoredOptimizer

Make = Callable[..., StoredOptimizer]
SHAPES = ((64, 128), (64, 32, 3, 3))
"""Of the parameters that are tried; the second in channels_last."""
STEPS = 2
_together: ContextVar[bool | None] = ContextVar("together", default=None)
"""In a trial, whether parameters are stepped together; None outside of one."""


def is_right(optimizer: StoredOptimizer, device: torch.device) -> bool:
    """Whether the optimizer may step several parameters of the device together."""
    asked = _together.get()
    if asked is not None:
        return asked
    kind: Make = type(optimizer)
    return device.type == "cpu" or _tried(kind, device, "momentum" in optimizer.defaults)


@cache
def _tried(kind: Make, device: torch.device, momentum: bool) -> bool:
    def once() -> None:
        one_by_one, together = (stepped(kind, device, momentum, together=how) for how in (False, True))
        if not all(torch.equal(one, other) for one, other in zip(one_by_one, together, strict=True)):
            raise ArithmeticError("it gives other numbers than one by one")

    return kernel_runs(device, f"steps of {getattr(kind, '__name__', kind)} on many parameters at once", once)


def stepped(kind: Make, device: torch.device, momentum: bool, *, together: bool) -> list[Tensor]:
    """Parameters in BF16 and their state after some steps, stepped together or one by one."""
    token = _together.set(together)
    try:
        draw = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(_drawn(shape, draw).to(device, torch.bfloat16)) for shape in SHAPES]
        options = {"lr": 0.01, "weight_decay": 0.1, "states": "8bit", **({"momentum": 0.9} if momentum else {})}
        optimizer = kind(weights, **options)
        optimizer.found_inf = torch.zeros((), device=device)  # type: ignore[attr-defined]
        for _ in range(STEPS):
            for weight in weights:
                weight.grad = _drawn(weight.shape, draw).to(device)
            optimizer.step()
        states = [value for weight in weights for value in optimizer.state[weight].values()]
        return [*weights, *(value for value in states if isinstance(value, Tensor))]
    finally:
        _together.reset(token)


def _drawn(shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    drawn = torch.randn(shape, generator=draw, device="cpu")
    return drawn.to(memory_format=torch.channels_last) if len(shape) == 4 else drawn
