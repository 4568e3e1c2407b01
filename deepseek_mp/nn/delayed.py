"""Delayed scaling: the scale of a tensor from the largest magnitudes that it had in past steps.

A scale that follows from the tensor itself costs a pass over it before the cast. Here the cast notes the largest
magnitude on its way, and the scales of the next step follow from the notes of the last `HISTORY` steps. For every
layer and each of its three tensors there is

    amax       the largest finite magnitude so far in this step; raised by every cast
    history    those of the last steps
    top        the magnitude that the scale has to hold in this step; 0: not known, the tensor's own counts
    wait       steps for which `top` stays 0
    saturated  steps in which values beyond `top` were cut

`top` and not the scale is kept: the scale follows from it as it follows from the tensor's own maximum, so the same
maximum gives the same bits, whatever the format, and scales that are powers of two need nothing of their own.

**Where the past is no guide**, the tensor's own maximum counts: in the first step, after steps without a value, and
for `HISTORY` steps after one in which values were cut. Then a tensor that has grown is in the history.

**A shared input.** In compiled code layers that read one tensor cast it once, by the scale of the first. The others
have no history of it, and nothing to report, until they cast it themselves.

**The state** is no part of the model's `state_dict` and is not copied with it: a copy of the model scales by the
tensors themselves until a plan is applied to it. `nn.convert` calls `place_scales` and `drop_scales`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepseek_mp.errors import PlanError, explain
from deepseek_mp.nn.functional import Scaling, UnitScaling
from deepseek_mp.nn.unit import Unit
from deepseek_mp.precision import Operand

HISTORY = 16
"""Steps that are looked back on. The largest of many is steadier; a spike is over after as many steps. Transformer
Engine takes 1024, under which a tensor that has shrunk for good loses small values for a thousand steps."""
HEADROOM = 2.0
"""`top` over the largest magnitude of the past. Without it one of 17 steps of a tensor that does not change would cut
values, since each of 17 is the largest equally often. A factor of two costs one binade of the smallest values and no
precision elsewhere."""
TENSORS = tuple(Operand)
"""In the order of the fields of `UnitScaling`."""
STORED = ("amax", "top", "wait", "saturated", "history")
_STATE = "delayed_scales"
_LENT = "delayed_scaling"
_ALIGNED = 4
"""Numbers of fp32 in 16 bytes: kernels get code of its own for a pointer that is not aligned to those."""


class Saturated(NamedTuple):
    """A tensor with values that were cut."""

    layer: str
    operand: Operand
    steps: int
    """Steps in which that happened."""


class DelayedScales:
    """The scales of all layers with delayed scaling on one device."""

    def __init__(self, units: Mapping[str, Unit], device: torch.device) -> None:
        count = len(units) * len(TENSORS)
        self.units, self.device = dict(units), device
        # Compiled code writes them in forward and in backward: each has memory of its own.
        self.amax = [torch.zeros((), device=device) for _ in range(count)]
        self.history = torch.zeros(HISTORY, count, device=device)
        self._tops = torch.zeros(count, _ALIGNED, device=device)
        self.top = self._tops[:, 0]
        self.wait = torch.zeros(count, device=device)
        self.saturated = torch.zeros(count, device=device)
        self.grown = torch.zeros(count, dtype=torch.bool, device=device)
        """Which tensors had values cut in the last step."""

    def lend(self) -> None:
        """Give each unit its own."""
        tops, width = self.top.unbind(), len(TENSORS)
        pairs = [Scaling(top, amax) for top, amax in zip(tops, self.amax, strict=True)]
        for i, unit in enumerate(self.units.values()):
            unit.__dict__[_LENT] = UnitScaling(*pairs[i * width : (i + 1) * width])

    @torch.no_grad()
    def update(self) -> None:
        """A step is over: take its maxima into the history, and the next step's `top` from that."""
        seen = torch.stack(self.amax)
        torch._foreach_zero_(self.amax)
        self.history.copy_(self.history.roll(1, 0))
        self.history[0] = seen
        torch.logical_and(self.top > 0, seen > self.top, out=self.grown)
        self.saturated += self.grown
        self.wait.copy_(torch.where(self.grown, float(HISTORY), (self.wait - 1).clamp_min(0)))
        top = self.history.amax(0) * HEADROOM
        self.top.copy_(torch.where((self.wait == 0) & top.isfinite(), top, 0.0))

    @torch.no_grad()
    def discard(self) -> None:
        """The step is given up: its maxima are forgotten."""
        torch._foreach_zero_(self.amax)

    def counts(self) -> list[Saturated]:
        """The tensors of which values were cut so far; waits for the device."""
        return self._named(self.saturated)

    def just_grown(self) -> list[Saturated]:
        """Those of which values were cut in the last step, with all their steps; waits for the device."""
        return self._named(self.saturated * self.grown)

    def _named(self, counts: Tensor) -> list[Saturated]:
        places = [(name, operand) for name in self.units for operand in TENSORS]
        return [Saturated(*place, int(n)) for place, n in zip(places, counts.tolist(), strict=True) if n]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by layer and by name of `STORED`."""
        parts: dict[str, Tensor] = {}
        for name in STORED:
            whole = torch.stack(self.amax) if name == "amax" else getattr(self, name)
            cut = whole.unflatten(-1, (len(self.units), len(TENSORS)))
            parts |= {f"{layer}/{name}": cut[..., i, :] for i, layer in enumerate(self.units)}
        return parts

    @torch.no_grad()
    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Continue with what `tensors` gave; a layer that was not among it begins anew."""
        now = self.tensors()
        for place, tensor in now.items():
            value = saved.get(place)
            if value is not None and value.shape == tensor.shape:
                tensor.copy_(value)
        # Of these `tensors` gave copies.
        flat = torch.cat([now[f"{layer}/amax"] for layer in self.units])
        torch._foreach_copy_(self.amax, list(flat.unbind()))

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def place_scales(model: nn.Module) -> list[DelayedScales]:
    """The state of the layers with delayed scaling, where those are now: one per device.

    What is in place already is kept; if a layer or its device has changed, all begin anew.
    """
    wanted: dict[torch.device, dict[str, Unit]] = defaultdict(dict)
    for name, module in model.named_modules():
        if _is_delayed(module):
            assert isinstance(module, Unit)
            assert isinstance(module.weight, Tensor)
            wanted[module.weight.device][name] = module
    now = scales_of(model)
    lent = all(_LENT in unit.__dict__ for scales in now for unit in scales.units.values())
    if now and lent and {scales.device: scales.units for scales in now} == wanted:
        return now
    drop_scales(model)
    made = [DelayedScales(units, device) for device, units in wanted.items()]
    for scales in made:
        scales.lend()
    if made:
        model.__dict__[_STATE] = made
    return made


def scales_of(model: nn.Module) -> list[DelayedScales]:
    """The state in place on the module that the plan was applied to; empty where there is none."""
    placed: list[DelayedScales | None] = model.__dict__.get(_STATE) or []
    return [scales for scales in placed if scales is not None]


def drop_scales(model: nn.Module) -> None:
    """No layer of the model has such a state any more."""
    for module in model.modules():
        module.__dict__.pop(_STATE, None)
        module.__dict__.pop(_LENT, None)


def update_scales(model: nn.Module) -> None:
    """Delayed scaling in a training loop of your own: call this once after every `optimizer.step()`.

    Pass the module that the plan was applied to. Nothing happens, and nothing waits, where its plan has no
    delayed scales. `MixedPrecisionTrainer` does it itself.

    Raises:
        PlanError: layers of this module have delayed scaling, but the state is not here: it is a wrapper, a part
            or a copy of the module that the plan was applied to.
    """
    for scales in _known(model):
        scales.update()


@contextmanager
def maxima_kept(model: nn.Module) -> Iterator[None]:
    """Whatever runs inside, delayed scaling has seen nothing of it."""
    found = [amax for scales in scales_of(model) for amax in scales.amax]
    kept = [amax.clone() for amax in found]
    try:
        yield
    finally:
        with torch.no_grad():
            for amax, before in zip(found, kept, strict=True):
                amax.copy_(before)


def saturated_tensors(model: nn.Module) -> list[Saturated]:
    """The tensors of which values were cut so far, because they grew faster than their history; waits for the device.

    Raises:
        PlanError: as for `update_scales`.
    """
    return [found for scales in _known(model) for found in scales.counts()]


def _known(model: nn.Module) -> list[DelayedScales]:
    placed = scales_of(model)
    if not placed and any(_is_delayed(module) for module in model.modules()):
        raise PlanError(
            explain(
                f"{type(model).__name__}, whose layers have delayed scales that are kept elsewhere",
                "the very module that the plan was applied to",
                "Pass that module; to a copy of it, apply the plan again",
            )
        )
    return placed


def _is_delayed(module: nn.Module) -> bool:
    products = module.unit_precision.products if isinstance(module, Unit) else None
    return products is not None and products.is_delayed
