"""A tensor on another device, without waiting where nobody could read it too early."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. Only a copy to the host is waited for: the host would read before it has arrived."""
    return tensor.to(device, non_blocking=device.type != "cpu")
