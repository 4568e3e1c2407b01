"""Says whether kernels may be launched before those in front of them have ended, `early_launches`.

A device that launches kernels so (programmatic dependent launch, NVIDIA from sm_90) has the next one's programs on its
processors while the last programs of the one in front are still at work. A kernel that takes part says where it begins
to need what others have written, and waits there; weights it may load before. So that is for calls in which nothing
writes to weights, as recorded ones of a served model are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from deepseek_mp.backends.early_launch import can_launch_early

_ARE_EARLY: ContextVar[bool] = ContextVar("early_launches", default=False)


@contextmanager
def early_launches(device: torch.device) -> Iterator[None]:
    """Inside, where the device can, kernels of this package load weights before those in front of them have ended."""
    token = _ARE_EARLY.set(can_launch_early(device))
    try:
        yield
    finally:
        _ARE_EARLY.reset(token)


def early() -> dict[str, bool]:
    """What a Triton launch is given, beside its own options: whether it may be early, and whether the kernel waits."""
    return {"EARLY": True, "launch_pdl": True} if _ARE_EARLY.get() else {"EARLY": False}
