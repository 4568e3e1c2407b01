"""A user's own `autograd.Function`, for tests of what the package makes of one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad
