"""Makes PyTorch's AdamW, Adam or SGD the optimizer of this package with the same rule, in place.

The object stays, and so do its groups, the rates in them, its hooks, and every reference to it: a scheduler's, a
callback's, the user's own.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import torch
from torch.optim import Optimizer

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.optim.adamw import AdamW
from deepseek_mp.optim.sgd import SGD
from deepseek_mp.optim.stored import StoredOptimizer

_OURS: Mapping[type[Optimizer], type[StoredOptimizer]] = {
    torch.optim.AdamW: AdamW,
    torch.optim.Adam: AdamW,
    torch.optim.SGD: SGD,
}
_WAYS = ("foreach", "fused", "capturable", "differentiable", "amsgrad", "maximize", "decoupled_weight_decay")
"""Options of PyTorch's that say how a step is computed, or that are off."""
_OFF = ("amsgrad", "maximize", "capturable", "differentiable")
"""Options that the optimizers here do not have."""
_SCHEDULED = "_wrapped_by_lr_sched"
"""Mark of the step of an optimizer that a scheduler of PyTorch's counts."""


def why_not(optimizer: Optimizer) -> str:
    """Why the optimizer cannot be taken over; empty if it can."""
    kind = type(optimizer)
    if kind not in _OURS:
        return f"{kind.__name__} is none of PyTorch's AdamW, Adam and SGD"
    if optimizer.state:
        return "it has made steps already"
    for group in optimizer.param_groups:
        if found := [name for name in _OFF if group.get(name)]:
            return f"{found[0]}=True has no counterpart"
        if kind is torch.optim.Adam and group["weight_decay"] and not group.get("decoupled_weight_decay"):
            return "Adam's weight decay is another than AdamW's"
        if any(parameter.dtype not in (torch.float32, torch.float64) for parameter in group["params"]):
            return "it trains parameters that are neither FP32 nor FP64"
    own = vars(optimizer).get("step")
    return "" if own is None or hasattr(own, _SCHEDULED) else "its step was replaced by another function"


def take_over(optimizer: Optimizer, *, states: str = "fp32") -> Callable[[], None]:
    """Make the optimizer an `AdamW` or `SGD` of `deepseek_mp.optim`; returns what makes it again what it was.

    A fused or foreach implementation that it named is not kept. What makes it again what it was drops the state that
    it has by then.

    Args:
        optimizer: of PyTorch's, that has no state yet.
        states: how moments are kept, as in `AdamW`.

    Raises:
        ConfigError: an optimizer that cannot be taken over; it is as it was.
    """
    if why := why_not(optimizer):
        passed = f"an optimizer to be taken over, but {why}"
        raise ConfigError(explain(passed, "a fresh AdamW, Adam or SGD of PyTorch", "Build it of deepseek_mp.optim"))
    kind, own = type(optimizer), dict(vars(optimizer))
    before = [dict(group) for group in optimizer.param_groups]
    new: Any = _OURS[kind]
    made = new([_options(group) | {"states": states} for group in before])
    for group, theirs in zip(optimizer.param_groups, made.param_groups, strict=True):
        _replace(group, theirs)
    optimizer.__class__ = new
    vars(optimizer).update(defaults=made.defaults, fates={}, _watched={}, tables={})
    _keep_counted(optimizer)

    def undo() -> None:
        optimizer.state.clear()
        optimizer.__class__ = kind
        vars(optimizer).clear()
        vars(optimizer).update(own)
        for group, options in zip(optimizer.param_groups, before, strict=True):
            _replace(group, options)

    return undo


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """What the group says of the rule, and what others have put there."""
    return {name: value for name, value in group.items() if name not in _WAYS}


def _replace(group: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Other options in the same dictionary, which schedulers hold on to."""
    kept = dict(options)
    group.clear()
    group.update(kept)


def _keep_counted(optimizer: Any) -> None:
    """A scheduler has put a wrapper around the step of the old class, to know that steps are made: one of the new."""
    if "step" not in vars(optimizer):
        return
    del optimizer.step
    step, held = type(optimizer).step, weakref.ref(optimizer)

    @wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        this: Any = held()
        this._opt_called = True
        return step(this, *args, **kwargs)

    setattr(counted, _SCHEDULED, True)
    optimizer.step = counted
