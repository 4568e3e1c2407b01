"""The learning rate of a group: a number, or a tensor that a device may have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deepseek_mp.errors import ConfigError, explain


def check_rate(rate: float | Tensor) -> None:
    """`ConfigError` for a learning rate that is several numbers, or a negative one."""
    if isinstance(rate, Tensor) and rate.numel() != 1:
        raise ConfigError(explain(f"lr of shape {list(rate.shape)}", "a number or a tensor []", "Use groups for rates"))
    if not isinstance(rate, Tensor) and not rate >= 0:
        raise ConfigError(explain(f"lr={rate!r}", "a number from 0", "Pass a positive number"))


def rate_of(group: Mapping[str, Any]) -> float | Tensor:
    """The learning rate of a group: a number, also of a tensor on the host; or a tensor [] on a device."""
    rate: float | Tensor = group["lr"]
    if not isinstance(rate, Tensor):
        return rate
    return rate.item() if rate.device.type == "cpu" else rate.reshape(())
