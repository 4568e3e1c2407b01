"""Says whether kernels may be launched before those in front of them have ended, `early_launches`.

A device that launches kernels so (programmatic dependent launch, NVIDIA from sm_90) has the next one's programs on its
processors while the last programs of the one in front are still at work. A kernel that takes part waits before it reads
what others may have written, and before it writes. Weights it may read ahead of that, where nothing in the calls writes
to them: whoever makes the calls says which these are, `unwritten`. What a call makes itself is none of them, as a copy
of weights that do not lie beside each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from deepseek_mp.backends.early_launch import can_launch_early

_ARE_EARLY: ContextVar[bool] = ContextVar("early_launches", default=False)
_UNWRITTEN: ContextVar[frozenset[int]] = ContextVar("unwritten", default=frozenset())
"""Where memories begin."""


@contextmanager
def early_launches(device: torch.device) -> Iterator[None]:
    """Inside, where the device can, kernels of this package are launched before those in front of them have ended."""
    token = _ARE_EARLY.set(can_launch_early(device))
    try:
        yield
    finally:
        _ARE_EARLY.reset(token)


@contextmanager
def unwritten(weights: Iterable[Tensor]) -> Iterator[None]:
    """Inside, no call writes to the memories of these tensors, which exist until the end."""
    token = _UNWRITTEN.set(frozenset(map(_memory, weights)))
    try:
        yield
    finally:
        _UNWRITTEN.reset(token)


def early() -> dict[str, bool]:
    """What a Triton launch is given, beside its own options: whether it may be early, and whether the kernel waits."""
    return {"EARLY": True, "launch_pdl": True} if _ARE_EARLY.get() else {"EARLY": False}


def is_unwritten(weight: Tensor) -> bool:
    """Whether a kernel may read the weight before it waits."""
    return _memory(weight) in _UNWRITTEN.get()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
