"""`Region`: in what arithmetic a plan has the model computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from deepseek_mp import backends
from deepseek_mp.nn.convert import fp32_arithmetic
from deepseek_mp.nn.unit import NARROW_FORMATS
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.trainer.compile import many_plans


class Region:
    """The plan's arithmetic: fp32 flags for forward and backward, autocast for forward and loss.

    Args:
        plan: whose arithmetic.
        device: where.
        search: whether libraries time their algorithms.
        fp32: how FP32 products are computed instead; None: as the plan says.
    """

    def __init__(
        self, plan: PrecisionPlan, device: torch.device, *, search: bool, fp32: backends.Fp32Mode | None = None
    ) -> None:
        self.format = plan.base.region
        self.casts = self.format in NARROW_FORMATS
        """Whether autocast casts weights in this region."""
        self._device = device
        self._fp32 = fp32 or fp32_arithmetic(plan)
        self._search = search

    def flags(self) -> Any:
        """Context for forward and backward."""
        return backends.math_mode(self._device, fp32=self._fp32, search=self._search)

    def autocast(self, *, cache: bool) -> Any:
        """Context for forward and loss. With `cache` a weight is cast once, however often it is used."""
        return backends.autocast(self._device, self.format, cache=cache)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Context for a forward without gradients."""
        with torch.no_grad(), self.flags(), self.autocast(cache=False), many_plans():
            yield
