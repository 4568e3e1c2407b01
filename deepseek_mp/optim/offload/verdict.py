"""Whether a step is applied, and by what its gradients are multiplied: loss scale, norm, clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.optim.offload.settings import OffloadSettings, StepReport


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """What is done to all gradients of a step: divided, as fused kernels unscale, then multiplied, as PyTorch clips.

    So both agree with PyTorch to the bit.
    """

    divisor: float = 1.0
    clip: float = 1.0

    @property
    def is_one(self) -> bool:
        return self.divisor == self.clip == 1.0

    @property
    def factor(self) -> float:
        """Both as one number."""
        return self.clip / self.divisor

    def into(self, target: Tensor, gradient: Tensor) -> Tensor:
        """The scaled gradient, written to the target."""
        if self.divisor != 1.0:
            torch.div(gradient, self.divisor, out=target)
            return target.mul_(self.clip) if self.clip != 1.0 else target
        return torch.mul(gradient, self.clip, out=target)


AS_IT_IS = Scaling()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """On one step."""

    reason: str | None
    """Why it is skipped; None applies it."""
    scaling: Scaling = AS_IT_IS
    """Of all gradients."""
    grad_norm: float | None = None

    @property
    def unscaling(self) -> Scaling:
        """The part of it that is not clipping."""
        return Scaling(divisor=self.scaling.divisor)

    @property
    def report(self) -> StepReport:
        return StepReport(
            applied=self.reason is None,
            reason=self.reason,
            grad_norm=self.grad_norm,
            factor=self.scaling.factor,
        )


def judge(
    grads: Sequence[Tensor],
    settings: OffloadSettings,
    *,
    scale: Tensor | None,
    found_inf: Tensor | None,
    norm: Callable[[], Tensor] | None = None,
    unseen: bool = False,
) -> Verdict:
    """The verdict on a step.

    Args:
        grads: fp32, accumulated, in the order of the groups.
        settings: which norm is allowed, and whether finiteness is looked at.
        scale: [], what a loss scaler wants the gradients divided by.
        found_inf: [], 1 where a loss scaler has found numbers that are not finite.
        norm: gives the L2 norm of the gradients, []. Where they are clipped it must be PyTorch's to the bit, as
            `torch.nn.utils.get_total_norm` takes it; None takes that.
        unseen: whether gradients are on their way, in mode 'immediate'.

    Raises:
        ConfigError: a loss scaler that has not seen all gradients: infinities in the others would be applied.
    """
    if unseen and found_inf is not None:
        passed = "a loss scaler's step in mode 'immediate', with gradients that the scaler has not seen"
        change = "Call land() before the scaler unscales or steps, and zero_grad() first if it has unscaled some"
        raise ConfigError(explain(passed, "gradients that are all on the host by then", change))
    if not grads and not unseen:
        return Verdict(reason="no_grads")
    if found_inf is not None and bool(found_inf):
        return Verdict(reason="scaler")
    divisor = 1.0 if scale is None else float(scale)
    taken, clip = None, 1.0
    limit = settings.max_grad_norm
    if limit is not None or (settings.check_finite and found_inf is None):
        total = (get_total_norm(grads) if norm is None else norm()).to("cpu") / divisor
        taken = float(total)
        if settings.check_finite and not math.isfinite(taken):
            return Verdict(reason="nonfinite", scaling=Scaling(divisor=divisor), grad_norm=taken)
        if limit is not None:
            clip = float(torch.clamp(limit / (total + 1e-6), max=1.0))
    return Verdict(reason=None, scaling=Scaling(divisor=divisor, clip=clip), grad_norm=taken)
