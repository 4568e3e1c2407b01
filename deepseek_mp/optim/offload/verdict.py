"""Whether a step is applied, and by what its gradients are multiplied: loss scale, norm, clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from deepseek_mp.optim.offload.settings import OffloadSettings, StepReport


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """On one step."""

    reason: str | None
    """Why it is skipped; None applies it."""
    factor: Tensor | None = None
    """fp32 []: for all gradients. None is one."""
    unscaling: Tensor | None = None
    """fp32 []: the part of it that is not clipping."""
    grad_norm: float | None = None

    @property
    def report(self) -> StepReport:
        factor = 1.0 if self.factor is None else float(self.factor)
        return StepReport(applied=self.reason is None, reason=self.reason, grad_norm=self.grad_norm, factor=factor)


def judge(
    grads: Sequence[Tensor], settings: OffloadSettings, *, scale: Tensor | None, found_inf: Tensor | None
) -> Verdict:
    """The verdict on a step.

    Args:
        grads: fp32, accumulated, in the order of the groups.
        settings: which norm is allowed, and whether finiteness is looked at.
        scale: [], what a loss scaler wants the gradients divided by.
        found_inf: [], 1 where a loss scaler has found numbers that are not finite.
    """
    if not grads:
        return Verdict(reason="no_grads")
    if found_inf is not None and bool(found_inf):
        return Verdict(reason="scaler")
    factor = unscaling = None if scale is None else scale.detach().to("cpu", torch.float32).reshape(()).reciprocal()
    norm = None
    limit = settings.max_grad_norm
    if limit is not None or (settings.check_finite and found_inf is None):
        total = get_total_norm(grads).to("cpu")
        total = total if factor is None else total * factor
        norm = float(total)
        if settings.check_finite and not math.isfinite(norm):
            return Verdict(reason="nonfinite", unscaling=unscaling, grad_norm=norm)
        if limit is not None:
            # As torch.nn.utils.clip_grad_norm_, so that clipped steps agree to the bit.
            clip = torch.clamp(limit / (total + 1e-6), max=1.0)
            factor = clip if factor is None else factor * clip
    if factor is not None and float(factor) == 1.0:
        factor = None
    return Verdict(reason=None, factor=factor, unscaling=unscaling, grad_norm=norm)
