"""The optimizer step as one transaction: unscale, check, clip, apply or skip, move the scale.

PyTorch's scaler is five calls with a state machine between them, and most of its known faults are
states in between: an exception after `unscale_` wedges it, clipping before it clips scaled numbers,
a positional closure slips past its check. Here `step` is the whole transaction. Nothing is left
half-done when it raises, and there is no order to get wrong.

How a step is skipped without asking the device. Optimizers with a fused kernel read two tensors,
`grad_scale` (divide the gradients by it) and `found_inf` (do nothing if it is 1). Unscaling, the
mean over an accumulation window and the clipping factor are all divisions, so they fold into that one
number: the gradients are read once for their norm and once by the optimizer. Any other optimizer
needs the answer on the host, which waits for the device once per step; so does the first step of
every optimizer, since a fused kernel that skips it would leave freshly allocated state unset.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Real
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from deepseek_mp.controller.loss_scale import LossScalePolicy, make_policy
from deepseek_mp.errors import ConfigError, LossScaleError, explain
from deepseek_mp.ops import gradients
from deepseek_mp.optim.offload.stepped import land


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What `LossScaler.step` did. Tensors are 0-dim and may still be on their way on the device."""

    nonfinite: Tensor
    """float32: 1 if the step was skipped because something was not finite, else 0."""
    skipped: Tensor
    """float32: 1 if the step was skipped for that or another reason, else 0."""
    grad_norm: Tensor
    """L2 norm of the unscaled gradients, before clipping."""
    scale: Tensor
    """float32: the scale these gradients were computed with."""
    status: str | None
    """'applied', 'skipped' or 'no_grads'; None while only the device knows."""


@cache
def _needs_closure(kind: type[Optimizer]) -> bool:
    closure = inspect.signature(kind.step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def check_optimizer(optimizer: Optimizer) -> None:
    """`ConfigError` for an optimizer that must evaluate the model itself."""
    if _needs_closure(type(optimizer)):  # type: ignore[arg-type]  # mypy misses that a class has a hash
        raise ConfigError(
            explain(
                f"optimizer {type(optimizer).__name__}, whose step needs a closure",
                "optimizers that step on the gradients they are given",
                "Use one of those, or run it in a loop of your own without loss scaling",
            )
        )


class LossScaler:
    """Scales the loss and steps optimizers, skipping a step whose gradients are not finite.

    Example:
        scaler = LossScaler("dynamic")
        scaler.scale(loss).backward()
        verdict = scaler.step(optimizer, max_grad_norm=1.0)

    Several optimizers in one `step` are one group: all are applied or none is.

    Args:
        policy: 'dynamic', 'predictive', 'static', 'none', a number, or a LossScalePolicy.
        device: where the gradients are; taken from the first loss when omitted.
    """

    def __init__(
        self, policy: str | float | LossScalePolicy = "dynamic", *, device: torch.device | str | None = None
    ) -> None:
        self.policy = make_policy(policy)
        self._stepped: WeakSet[Optimizer] = WeakSet()
        self._steppable: set[int] = set()
        self._scaled = False
        self.norms: tuple[list[Tensor], Tensor] | None = None
        """While optimizers step: parameters, and the L2 norm of each one's unscaled gradient before clipping."""
        if device is not None:
            self.policy.to(torch.device(device))

    def get_scale(self) -> float:
        """The current scale as a number; waits for the device."""
        return float(self.policy.scale)

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the scale, in float32; call `backward` on the result."""
        if not isinstance(loss, Tensor):
            passed, change = f"scale({loss!r})", "Pass the loss itself, before .item() or float()"
            raise ConfigError(explain(passed, "a tensor", change))
        if self.policy.scale.device != loss.device:
            self.policy.to(loss.device)
        self._scaled = True
        return loss if self.policy.name == "none" else loss * self.policy.scale

    def step(
        self,
        *optimizers: Optimizer,
        max_grad_norm: float | None = None,
        divisor: Tensor | None = None,
        nonfinite: Tensor | None = None,
        empty: Tensor | None = None,
        before: Callable[[], None] | None = None,
    ) -> Verdict:
        """Apply or skip one step of the optimizers, and move the scale.

        Args:
            max_grad_norm: clip the L2 norm of all unscaled gradients to this; above 0.
            divisor: 0-dim; the gradients are also divided by it (a window's total weight).
            nonfinite: 0-dim; 1 skips the step whatever the gradients are (a loss that was not finite).
            empty: 0-dim; 1 skips the step as well, without blaming the scale (a window without items).
            before: called on the unscaled gradients, before they are checked, clipped and applied.

        Returns:
            `nonfinite`, `skipped`, `grad_norm` (before clipping) and `scale`, 0-dim tensors that may still be on their
            way; and `status`, 'applied', 'skipped' or 'no_grads', None while only the device knows.

        Raises:
            LossScaleError: the loss of this step was not scaled by `scale`.
            ConfigError: an argument that is not an Optimizer (a closure, for instance), or a norm that is no limit.
        """
        self._check_call(optimizers)
        _check_limit(max_grad_norm)
        for optimizer in optimizers:
            land(optimizer)
        listed = [p for o in optimizers for group in o.param_groups for p in group["params"] if p.grad is not None]
        params = list(dict.fromkeys(listed))  # once, also what two optimizers train
        if not params:
            return self._without_gradients()
        grads = gradients.gradient_views(params)
        used = self.policy.scale.clone()
        total = self._total(used, divisor)
        if before is not None:
            if total is not None:
                gradients.multiply_(grads, total.reciprocal())
                total = None
            before()
            grads = gradients.gradient_views(params)
        sizes = gradients.norms(grads)
        norm = gradients.l2_norm_of(sizes)
        amax = gradients.largest_magnitude(grads) * used if self.policy.needs_amax else None
        bad = torch.isfinite(norm).logical_not_().to(torch.float32).to(used.device, non_blocking=True)
        if nonfinite is not None:
            bad = torch.maximum(bad, nonfinite)
        if total is not None:
            norm, sizes = norm / total, sizes / total.to(sizes.device)
            amax = None if amax is None else amax / total
        skip = bad
        if empty is not None:  # whatever its numbers are: a mean over nothing is 0/0
            nothing = empty.to(bad.device, torch.bool, non_blocking=True)
            skip, bad = torch.maximum(bad, nothing), bad.masked_fill(nothing, 0.0)
            amax = None if amax is None else amax.masked_fill(nothing, 0.0)
        total = _with_clipping(total, norm, max_grad_norm)
        if total is not None and len(params) < len(listed):  # a fused kernel would leave it unscaled to the next one
            gradients.multiply_(grads, total.reciprocal())
            total = None
        self.norms = params, sizes
        try:
            status = self._apply(optimizers, params, grads, total, skip)
        finally:
            self.norms = None
        self._scaled = False
        self.policy.update(bad, amax)
        return Verdict(nonfinite=bad, skipped=skip, grad_norm=norm, scale=used, status=status)

    def _total(self, scale: Tensor, divisor: Tensor | None) -> Tensor | None:
        """All that the gradients carry: the scale and the divisor. None when that is one."""
        if self.policy.name == "none":
            return divisor
        return scale if divisor is None else scale * divisor

    def _check_call(self, optimizers: Sequence[Any]) -> None:
        if not optimizers or not all(isinstance(o, Optimizer) for o in optimizers):
            given = ", ".join(type(o).__name__ for o in optimizers) or "nothing"
            raise ConfigError(
                explain(
                    f"step({given})",
                    "one or more torch.optim.Optimizer",
                    "Closures are not supported: pass only optimizers",
                )
            )
        for optimizer in optimizers:
            check_optimizer(optimizer)
        if not self._scaled and self.policy.name != "none":
            raise LossScaleError(
                explain(
                    "step() without a scaled loss since the last step",
                    "scaler.scale(loss).backward(), then one scaler.step(...)",
                    "Call backward on scaler.scale(loss), and step once per window with all optimizers in one call",
                )
            )

    def _without_gradients(self) -> Verdict:
        self._scaled = False
        zero = torch.zeros((), device=self.policy.scale.device)
        scale = self.policy.scale.clone()
        return Verdict(nonfinite=zero, skipped=torch.ones_like(zero), grad_norm=zero, scale=scale, status="no_grads")

    def _apply(
        self,
        optimizers: Sequence[Optimizer],
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        total: Tensor | None,
        skip: Tensor,
    ) -> str | None:
        """Step the optimizers unless `skip`; None when only the device knows whether they were."""
        fused = all(getattr(o, "_step_supports_amp_scaling", False) for o in optimizers)
        ids = {id(p) for p in params}
        on_host = skip.device.type == "cpu" or any(p.device.type == "cpu" for p in params)
        waits = on_host or not fused or self._is_first(optimizers, ids)
        if waits and bool(skip):
            return "skipped"
        if total is not None and not fused:
            gradients.multiply_(grads, total.reciprocal())
        for optimizer in optimizers:
            if fused:
                _fused_step(optimizer, total, None if waits else skip)
            else:
                optimizer.step()
        self._stepped.update(optimizers)
        self._steppable |= ids
        return "applied" if waits else None

    def _is_first(self, optimizers: Sequence[Optimizer], ids: set[int]) -> bool:
        """Whether one of the optimizers has yet to make its state, for one of the parameters with these ids."""
        return not (ids <= self._steppable and all(optimizer in self._stepped for optimizer in optimizers))

    def __getstate__(self) -> dict[str, Any]:
        """All but which optimizers were stepped: a copy, or another process, has others."""
        return {name: value for name, value in vars(self).items() if name not in ("_stepped", "_steppable")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _stepped=WeakSet(), _steppable=set())

    def state_dict(self) -> dict[str, Any]:
        """The policy's state as JSON values. Complete at any time: a step leaves nothing in between."""
        return self.policy.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over a saved state; `LossScaleError` (nothing changed) if it is not valid."""
        self.policy.load_state_dict(saved)


def _check_limit(max_grad_norm: object) -> None:
    """`ConfigError` for what would make every gradient zero or NaN, or clip none."""
    if isinstance(max_grad_norm, Tensor) and max_grad_norm.dim() == 0:
        return  # reading it would wait for the device
    if max_grad_norm is not None and not (isinstance(max_grad_norm, Real) and float(max_grad_norm) > 0):
        passed, change = f"max_grad_norm={max_grad_norm!r}", "Pass for example 1.0"
        raise ConfigError(explain(passed, "None or a number above 0", change))


def _with_clipping(total: Tensor | None, norm: Tensor, max_grad_norm: float | None) -> Tensor | None:
    """`total` divided by the clipping factor min(1, max_grad_norm / norm)."""
    if max_grad_norm is None:
        return total
    excess = torch.clamp(norm / max_grad_norm, min=1.0).to(torch.float32)
    return excess if total is None else total * excess


def _fused_step(optimizer: Optimizer, total: Tensor | None, found_inf: Tensor | None) -> None:
    """Step with the two tensors that fused kernels read; they are removed again whatever happens."""
    fused: Any = optimizer
    fused.grad_scale, fused.found_inf = total, found_inf
    try:
        optimizer.step()
    finally:
        for name in ("grad_scale", "found_inf"):
            fused.__dict__.pop(name, None)  # an offloaded optimizer that fails has removed them
