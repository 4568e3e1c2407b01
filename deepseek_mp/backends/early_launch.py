"""Which devices launch kernels before those in front of them have ended (programmatic dependent launch)."""

from __future__ import annotations

from functools import cache

import torch

FIRST = (9, 0)
"""NVIDIA's first processors that do, sm_90."""


@cache
def can_launch_early(device: torch.device) -> bool:
    """Whether a device does."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= FIRST
