"""How a served model computes, whatever the code that calls it has switched on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch

from deepseek_mp.backends import math_mode


def arithmetic(device: torch.device, fp32: Literal["ieee", "tf32", "hf32"] = "ieee") -> AbstractContextManager[None]:
    """A region in which FP32 products are really `fp32`, algorithms are searched for, and no autocast casts.

    A caller's autocast would make other formats of a form's products, and of a graph that is exported.
    """
    mode = math_mode(device, fp32=fp32, search=True)
    # Asked, since a region that turns it off costs some microseconds of each call; there is none on 'meta'.
    casts = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return _without_autocast(mode, device.type) if casts else mode


@contextmanager
def _without_autocast(mode: AbstractContextManager[None], kind: str) -> Iterator[None]:
    with torch.autocast(kind, enabled=False), mode:
        yield
