"""How far a model's outputs are from those of the FP32 reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.nn.nested import map_leaves, tensors

Metric = Callable[[Any, Any], float]
"""From outputs and the reference's to a number, 0 for equal ones and larger for worse."""


def kl(outputs: Any, reference: Any) -> float:
    """Mean over positions of sum p log(p / q), in nats; p and q are the softmax of the last dimension.

    Args:
        outputs: [..., V] logits, or a mapping or an object with `logits`.
        reference: the same of the reference.
    """
    logits, expected = (_logits(value) for value in (outputs, reference))
    p = torch.log_softmax(expected.double(), dim=-1)
    q = torch.log_softmax(logits.double(), dim=-1)
    return float((p.exp() * (p - q)).sum(-1).mean().clamp_min(0))  # which it is but for rounding; NaN stays


def relative(outputs: Any, reference: Any) -> float:
    """The norm of the difference over that of the reference, the largest over the floating and complex tensors."""
    pairs = zip(map(_wide, _numbers(outputs)), map(_wide, _numbers(reference)), strict=True)
    found = [float((one - two).norm() / two.norm().clamp_min(1e-300)) for one, two in pairs]
    return max(found, key=lambda value: math.inf if math.isnan(value) else value)


ROUNDING = 1e-6
"""A metric of one's own in FP32 may be off 0 by so much for equal outputs, as 1 - cosine is."""
SHARE = 0.01
"""Or by this part of the budget, which then still bounds what a form loses."""
METRICS: Mapping[str, Metric] = {"kl": kl, "relative": relative}


def find_metric(metric: str | Metric) -> Metric:
    """The metric of that name, or the function itself; `ConfigError` for another name, and for a class."""
    if callable(metric) and not isinstance(metric, type):  # which would be made of the outputs, not measure them
        return metric
    if not isinstance(metric, str) or metric not in METRICS:
        allowed = f"{', '.join(map(repr, METRICS))}, or a function of outputs and the reference's"
        raise ConfigError(explain(f"metric={metric!r}", allowed, "Use one of these"))
    return METRICS[metric]


def measured(metric: Metric, outputs: Any, reference: Any) -> float:
    """What the metric gives; `ConfigError` for what is no number, and for a metric that writes to what it is given."""
    given = [tensor for tensor in tensors((outputs, reference)) if not tensor.is_inference()]
    before = [tensor._version for tensor in given]  # noqa: SLF001 - it has no public name
    value: Any = metric(outputs, reference)
    if before != [tensor._version for tensor in given]:  # noqa: SLF001 - as above
        passed = f"the metric {name_of(metric)!r} that writes to the outputs or the reference"
        change = "Let it work on copies: other forms are measured against the same reference"
        raise ConfigError(explain(passed, "one that only reads them", change))
    several = isinstance(value, Tensor) and value.numel() != 1
    is_complex = isinstance(value, Tensor) and value.is_complex()
    if not (several or is_complex or isinstance(value, str | bytes)):  # Python would read a number from text
        with suppress(TypeError, ValueError):
            return float(value)
    what = f"tensor of shape {list(value.shape)}" if several else type(value).__name__
    passed = f"the metric {name_of(metric)!r} that gave a {what}"
    change = "Let it return one, a tensor reduced by .mean() for one"
    raise ConfigError(explain(passed, "one number for all outputs", change))


def error_of(metric: Metric, outputs: Any, reference: Any) -> float:
    """What the metric gives; infinite for outputs that are not finite, or of which it is not.

    A metric need not see that: it may look at a part of the outputs, or at their largest alone.
    """
    found = measured(metric, outputs, reference)
    return found if math.isfinite(found) and is_finite(outputs) else math.inf


def check_metric(metric: Metric, reference: Any, budget: float) -> None:
    """`ConfigError` unless the metric is 0 for equal outputs: otherwise no budget says how far a form may be off.

    A similarity would never be within it, a negated one always; what layers lose could not be added up.
    """
    found = measured(metric, reference, reference)
    if abs(found) <= max(ROUNDING, SHARE * budget) and math.isfinite(found):
        return
    change = "Subtract what it gives for the reference, and let larger be worse"
    if not math.isfinite(found):
        change = "Pass inputs of one sample or more, or another metric"
    passed = f"a metric that is {found:g} between outputs and themselves"
    raise ConfigError(explain(passed, "0 for equal ones", change))


def name_of(metric: str | Metric) -> str:
    """As plans and messages have it."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", type(metric).__name__)


def is_finite(outputs: Any) -> bool:
    """Whether all tensors of the outputs are; whole numbers always are. `ConfigError` if there is no tensor."""
    return all(bool(tensor.isfinite().all()) for tensor in _tensors(outputs))


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, Mapping):
        outputs = outputs.get("logits", outputs)
    outputs = getattr(outputs, "logits", outputs)
    if not (isinstance(outputs, Tensor) and outputs.is_floating_point() and outputs.dim() and outputs.shape[-1] > 1):
        passed = f"metric='kl' for outputs of type {type(outputs).__name__}"
        allowed = "logits [..., V] of two classes or more, or an output that has `logits`"
        raise ConfigError(explain(passed, allowed, "Use metric='relative', or a function of your own"))
    return outputs


def _numbers(outputs: Any) -> list[Tensor]:
    """The floating and complex tensors, in order; `ConfigError` if there is none."""
    found = [tensor for tensor in _tensors(outputs) if tensor.is_floating_point() or tensor.is_complex()]
    if not found:
        passed = f"metric='relative' for outputs without a floating tensor, of type {type(outputs).__name__}"
        raise ConfigError(explain(passed, "floating or complex tensors", "Pass a metric of your own"))
    return found


def _tensors(outputs: Any) -> list[Tensor]:
    """All tensors, in order; `ConfigError` if there is none, or one that is not dense."""
    found: list[Tensor] = []

    def see(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            found.append(leaf)
        return leaf

    map_leaves(outputs, see)
    if not found:
        passed = f"outputs without a tensor, of type {type(outputs).__name__}"
        change = "Let the model's forward return one of these"
        raise ConfigError(explain(passed, "tensors, in tuples, lists, mappings or dataclasses", change))
    if other := [one for one in found if one.is_nested or one.layout is not torch.strided]:
        passed = f"outputs with a tensor that is {'nested' if other[0].is_nested else other[0].layout}"
        raise ConfigError(explain(passed, "dense tensors", "Let the model's forward return it as one"))
    return found


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)
