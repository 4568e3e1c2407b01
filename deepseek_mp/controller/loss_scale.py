"""Loss-scale policies: what the loss is multiplied by so that fp16 gradients neither vanish nor overflow.

fp16 holds magnitudes from 6e-8 to 65504. Gradients of a deep model are often far smaller, so the
loss is scaled up before backward and the gradients are scaled down again in float32. The scale only
has to be a power of two inside the window where the largest gradient does not overflow and the small
ones do not vanish; the policies differ in how they find it:

- `dynamic` probes: double after `interval` good steps, halve at every overflow. It pays for its
  knowledge with one lost step per probe.
- `predictive` measures: it keeps the largest gradient seen and puts the scale a fixed headroom
  below overflow, so that an overflow is rare; each one that still happens widens the headroom.
- `static` and `none` keep a number.

A policy holds its state in 0-dim tensors on the device of the gradients and updates them by tensor
operations, so an update never waits for the device. Scales stay inside [floor, ceiling], both finite
and positive: a scale that reaches zero would turn the next healthy step into 0 * inf.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from deepseek_mp.errors import ConfigError, LossScaleError, explain
from deepseek_mp.precision.formats import FP16

FLOOR = 2.0**-14
CEILING = 2.0**24


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise LossScaleError(explain(f"loss scale with {name}={value!r}", f"{name} {allowed}", f"Change {name}"))


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _require_steps(name: str, value: object) -> None:
    counts = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    _require(counts, name, value, "is a whole number of steps, at least 1")


class LossScalePolicy(ABC):
    """How the loss scale evolves. Subclass it and pass an instance as `loss_scale_policy`.

    `state` maps names to 0-dim tensors; `scale` (float32) is always one of them. `update` must change
    them in place by tensor operations; reading a value with `.item()` there works but waits for the
    device at every step.

    Args:
        initial: the first scale, within floor and ceiling.
        floor, ceiling: the scale never leaves these.

    Raises:
        LossScaleError: a number that is not finite and above 0, or an initial scale outside of the two.
    """

    name: ClassVar[str] = "custom"
    """Marks saved states; a state of another name is refused."""
    needs_amax: ClassVar[bool] = False
    """Whether `update` reads the largest gradient; measuring it is one more pass over the gradients."""

    def __init__(self, initial: float, *, floor: float = FLOOR, ceiling: float = CEILING) -> None:
        _require(_is_positive(floor), "floor", floor, "is a finite number above 0")
        _require(_is_positive(ceiling) and ceiling >= floor, "ceiling", ceiling, f"is finite and at least {floor}")
        fits = _is_positive(initial) and floor <= initial <= ceiling
        _require(fits, "initial", initial, f"is a finite number in [{floor}, {ceiling}]")
        self.floor = float(floor)
        self.ceiling = float(ceiling)
        self.state: dict[str, Tensor] = {"scale": torch.tensor(float(initial), dtype=torch.float32)}

    @property
    def scale(self) -> Tensor:
        """The current scale: 0-dim, float32."""
        return self.state["scale"]

    def to(self, device: torch.device) -> None:
        """Move the state to `device`."""
        self.state = {name: tensor.to(device) for name, tensor in self.state.items()}

    @abstractmethod
    def update(self, nonfinite: Tensor, amax: Tensor | None) -> None:
        """Move to the next step's scale.

        Args:
            nonfinite: 0-dim float32, 1 where the step's gradients or loss were not finite, else 0.
            amax: 0-dim, largest magnitude of the *scaled* gradients, or None unless `needs_amax`.
        """

    def raise_floor(self, floor: float) -> None:
        """Keep the scale at or above `floor` from now on (for devices that flush subnormals)."""
        self.floor = max(self.floor, min(floor, self.ceiling))
        self.state["scale"].clamp_(min=self.floor)

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values; waits for the device."""
        return {"policy": self.name, **{name: tensor.item() for name, tensor in self.state.items()}}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over a saved state; on a `LossScaleError` nothing has changed."""
        if saved.get("policy") != self.name:
            raise LossScaleError(
                explain(
                    f"loss-scale state of policy {saved.get('policy')!r}",
                    f"state of the policy in use, {self.name!r}",
                    f"Construct with loss_scale_policy={saved.get('policy')!r}, or load without the scale's state",
                )
            )
        missing = sorted(self.state.keys() - saved.keys())
        if missing:
            raise LossScaleError(
                explain(f"loss-scale state without {missing}", f"{sorted(self.state)}", "Save the state again")
            )
        fits = _is_positive(saved["scale"]) and self.floor <= saved["scale"] <= self.ceiling
        _require(fits, "scale", saved["scale"], f"is in [{self.floor}, {self.ceiling}]")
        for name in self.state:
            value = saved[name]
            valid = isinstance(value, int | float) and math.isfinite(value) and value >= 0
            _require(valid, name, value, "is a finite number of at least 0")
        for name, tensor in self.state.items():
            tensor.fill_(saved[name])


class DynamicLossScale(LossScalePolicy):
    """Multiply by `growth` after `interval` good steps in a row, by `backoff` at each bad one.

    The rule of Micikevicius et al., Mixed Precision Training (2018), with bounds.
    """

    name = "dynamic"

    def __init__(
        self,
        initial: float = 2.0**16,
        *,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
        floor: float = FLOOR,
        ceiling: float = CEILING,
    ) -> None:
        super().__init__(initial, floor=floor, ceiling=ceiling)
        _require(_is_positive(growth) and growth > 1, "growth", growth, "is a finite number above 1")
        _require(_is_positive(backoff) and backoff < 1, "backoff", backoff, "is a number between 0 and 1")
        _require_steps("interval", interval)
        self.growth, self.backoff, self.interval = float(growth), float(backoff), interval
        self.state["good_steps"] = torch.zeros((), dtype=torch.int32)

    def update(self, nonfinite: Tensor, amax: Tensor | None) -> None:  # noqa: ARG002
        torch._amp_update_scale_(
            self.scale, self.state["good_steps"], nonfinite, self.growth, self.backoff, self.interval
        )
        self.scale.clamp_(self.floor, self.ceiling)


class PredictiveLossScale(LossScalePolicy):
    """Keep the largest scaled gradient `headroom` times below the fp16 limit.

    The largest gradient is that of the parameters, remembered with a slow decay. Gradients inside the
    model can be larger: an overflow that happens all the same multiplies the headroom by 4, and
    `interval` good steps in a row halve it again, down to the given one.
    """

    name = "predictive"
    needs_amax = True

    def __init__(
        self,
        initial: float = 2.0**10,
        *,
        headroom: float = 16.0,
        decay: float = 0.99,
        interval: int = 2000,
        floor: float = FLOOR,
        ceiling: float = CEILING,
    ) -> None:
        super().__init__(initial, floor=floor, ceiling=ceiling)
        _require(_is_positive(headroom) and headroom >= 1, "headroom", headroom, "is a finite number of at least 1")
        _require(_is_positive(decay) and decay <= 1, "decay", decay, "is a number above 0 and at most 1")
        _require_steps("interval", interval)
        self.headroom, self.decay, self.interval = float(headroom), float(decay), interval
        self.state["peak"] = torch.zeros(())
        self.state["headroom"] = torch.tensor(self.headroom)
        self.state["good_steps"] = torch.zeros(())

    def update(self, nonfinite: Tensor, amax: Tensor | None) -> None:
        assert amax is not None, "needs_amax is set"
        good = nonfinite == 0
        scale, peak, headroom, steps = (self.state[name] for name in ("scale", "peak", "headroom", "good_steps"))
        seen = torch.where(good, amax.to(torch.float32) / scale, 0.0)
        peak.mul_(torch.where(good, self.decay, 1.0)).copy_(torch.maximum(seen, peak))
        steps.add_(1).mul_(good)
        relax = steps >= self.interval
        steps.mul_(~relax)
        wider = torch.where(good, torch.where(relax, headroom / 2, headroom), headroom * 4)
        headroom.copy_(wider.clamp(self.headroom, self.headroom * 2.0**20))
        # Nothing is known before the first good step: then an overflow halves, as if probing.
        target = torch.exp2(torch.floor(torch.log2(FP16.max / (headroom * peak))))
        known = torch.where(good, target, torch.minimum(target, scale / 2))
        scale.copy_(torch.where(peak > 0, known, torch.where(good, scale, scale / 2)))
        scale.clamp_(self.floor, self.ceiling)


class StaticLossScale(LossScalePolicy):
    """Always the same scale."""

    name = "static"

    def __init__(self, scale: float = 2.0**10) -> None:
        super().__init__(scale, floor=min(FLOOR, scale) if _is_positive(scale) else FLOOR)

    def update(self, nonfinite: Tensor, amax: Tensor | None) -> None:
        """A static scale does not move."""


class NoLossScale(LossScalePolicy):
    """The scale is one: for formats with the exponent range of float32."""

    name = "none"

    def __init__(self) -> None:
        super().__init__(1.0)

    def update(self, nonfinite: Tensor, amax: Tensor | None) -> None:
        """The scale stays one."""


POLICIES: dict[str, type[LossScalePolicy]] = {
    policy.name: policy for policy in (DynamicLossScale, PredictiveLossScale, StaticLossScale, NoLossScale)
}


def make_policy(spec: str | float | LossScalePolicy) -> LossScalePolicy:
    """A policy from its name, from a number (a static scale), or the policy itself."""
    if isinstance(spec, LossScalePolicy):
        return spec
    if isinstance(spec, str) and spec in POLICIES:
        return POLICIES[spec]()  # type: ignore[call-arg]
    if isinstance(spec, int | float) and not isinstance(spec, bool):
        return StaticLossScale(spec)
    names = ", ".join(map(repr, POLICIES))
    raise ConfigError(
        explain(
            f"loss_scale_policy={spec!r}",
            f"{names}, a positive number, or a LossScalePolicy",
            "Use one of these",
        )
    )
