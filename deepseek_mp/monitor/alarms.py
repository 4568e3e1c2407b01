"""Alarms: numbers of a layer that went beyond what is known to be safe, and the limits of that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from deepseek_mp.errors import ConfigError, explain

_WHOLE = {"in_a_row": 1, "spikes_in_a_row": 1, "warmup": 0, "rms_after": 0}
"""Whole numbers among the limits, and the smallest each can be."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is let pass. Only the format in use raises alarms, not those one asks about; None switches one off."""

    mass: float | None = 0.005
    """Share of the sum of magnitudes of an input or weight that rounding takes or adds, beyond what rounding to the
    nearest takes anyway. How many values become zero is no harm of its own: after a GELU up to a tenth of the values do
    in FP8, for they are a millionth of the others."""
    gradient_mass: float | None = 0.02
    """The same of an output gradient: as a change of the learning rate that differs from layer to layer."""
    lean: float | None = 0.02
    """How far the errors of an output gradient lean to one side: those do not cancel over the steps."""
    underflow: float | None = 0.005
    """Share of an input's or weight's values that an unscaled format makes zero: FP16, whose range they left."""
    gradient_underflow: float | None = 0.05
    """The same of an output gradient."""
    overflow: float | None = 0.0
    """Share of values that become infinite: one is enough to lose a step."""
    by_row: float | None = 5.0
    """Mean error energy of a row over its energy, in units of what the format does to values it can hold
    (`ops.statistics.ideal_error`). Above, rows lie outside the format's range and are not rounded but cut."""
    kurtosis: float | None = 4.0
    """Of an input, over its first value (at least 3, that of normal values), where a scaled format in use makes more
    than an 800th of the values zero: outliers have grown, and take the range from what shares a scale with them.
    Kurtosis alone is no harm: activations grow sparse as they should."""
    spike: float | None = 5.0
    """A gradient's norm over its usual one."""
    rms: float | None = 2.3
    """Of the gradient over its second moment; losses spike some steps after ("Stable and low-precision training",
    arXiv 2304.13013)."""
    rms_after: int = 1000
    """Calls of the model before `rms` counts: as long as the second moment has not seen the 1 / (1 - 0.999) steps that
    it spans, every gradient that begins to grow looks like a spike."""
    edq: float | None = 0.95
    """What an update must still do of what it should, of weights that are stored in 16 bits and rounded to the
    nearest; `deepseek_mp.optim` writes them in other ways. Their lost share must
    not exceed what is missing to 1, since the update that was meant is not known of them."""
    non_finite: bool = True
    """The first module that made an infinity or NaN of finite numbers; in the backward, where a loss scale is found by
    trying, only if sampled steps in a row have one."""
    in_a_row: int = 3
    """Samples of a layer that must be beyond a limit one after the other: a sample of rows is noisy, and single batches
    are unlike the others. In the forward, overflow and values that are not finite count at once."""
    spikes_in_a_row: int = 2
    """The same for `spike`, whose own past grows along with what is to be noticed."""
    warmup: int = 5
    """Samples before `spike` counts: a mean of fewer is none."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _WHOLE:
                good = isinstance(value, int) and not isinstance(value, bool) and value >= _WHOLE[field.name]
                allowed = f"a whole number from {_WHOLE[field.name]}"
            elif field.name == "non_finite":
                good, allowed = isinstance(value, bool), "True or False"
            else:
                good = value is None or (isinstance(value, int | float) and value >= 0)
                allowed = "None or a number from 0"
            if not good:
                raise ConfigError(explain(f"{field.name}={value!r}", allowed, f"Change {field.name}"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Alarm:
    """A number that went beyond its limit."""

    step: int
    """Calls of the model with gradients on until then, that one included."""
    layer: str
    tensor: str
    """'input', 'weight', 'grad_output' or 'update'; where non-finite values came up, 'output' or 'grad_input'."""
    kind: str
    """The field of `Limits`, without 'gradient_'."""
    value: float
    limit: float

    def to_json(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __str__(self) -> str:
        layer = self.layer or "(model)"
        return f"{layer}, {self.tensor}: {self.kind} {self.value:.4g}, limit {self.limit:.4g} (step {self.step})"


Reading = tuple[str, str, float, float, int]
"""Tensor, kind, value, limit, samples in a row beyond it that make an alarm."""


class Judge:
    """Remembers how often in a row each number was beyond its limit."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._in_a_row: dict[tuple[str, str, str], int] = {}

    def judge(self, step: int, layer: str, readings: Iterator[Reading]) -> Iterator[Alarm]:
        """The alarms of one sample of a layer. A number that stays beyond its limit raises one only."""
        for tensor, kind, value, limit, wanted in readings:
            key = (layer, tensor, kind)
            if value <= limit:
                self._in_a_row.pop(key, None)
                continue
            self._in_a_row[key] = count = self._in_a_row.get(key, 0) + 1
            if count == wanted:
                yield Alarm(step=step, layer=layer, tensor=tensor, kind=kind, value=value, limit=limit)
