"""Spikes of single layers: a gradient far above its usual norm, or one that has outgrown Adam's second moment. And of
the learning rate.

Pure: fed with numbers, it says which of the lowered layers are to be raised for a short time. A layer is held for that
while only, since most spikes come from the batch; and few at once, the worst, since a spike in all layers at once is no
layer's fault.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

TIMES_USUAL = 5.0
"""A norm so many times its running mean is a spike."""
UPDATE_RMS = 2.3
"""Of the gradient over its second moment; losses spike some steps after ("Stable and low-precision training", arXiv
2304.13013)."""
SIGMAS = 6.0
"""And so many standard deviations of the layer's own logarithm above its mean: where the loss is almost nothing,
gradients are those of a few hard examples, and scatter by more than five times as they should."""
COUNTED, FLOOR = 3.0, 0.05
"""Standard deviations up to which a value counts in the means, of a scatter that is at least so much."""
LEAST = 32
"""As many steps must have been seen before one can be a spike."""
DECAY = 0.98
"""Of the means, from step to step: the last fifty count."""
HELD = 64
"""Steps that a layer stays raised."""
AT_ONCE = 0.1
"""Share of the layers that are held at once, at least one."""
RATE_JUMP = 1.5
"""A learning rate so many times the highest before is a spike. A restart goes to the highest again."""
NORM, RMS = "gradient_spike", "update_rms"
IN_A_ROW = {NORM: 1, RMS: 2}
"""Steps that make a spike. A second moment that a gradient has outgrown is too small for many steps; a batch unlike the
others is so for one."""


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """What a step's gradient of one layer's weight was like."""

    norm: float
    rms: float | None = None
    """sqrt(mean(g^2 / v)) with Adam's second moment v; None where that is not known, or not yet worth knowing."""


@dataclass(frozen=True, kw_only=True)
class Spike:
    """A layer that is to be raised for a while."""

    layer: str
    guard: str
    """`NORM` or `RMS`."""
    value: float
    usual: float
    """Its running mean before."""
    limit: float

    @property
    def evidence(self) -> dict[str, Any]:
        return {"guard": self.guard, "value": self.value, "usual": self.usual, "limit": self.limit}

    @property
    def words(self) -> str:
        what = "its gradient" if self.guard == NORM else "its gradient over Adam's second moment"
        return f"{what} is {self.value:.3g}, usually {self.usual:.3g}"


@dataclass(kw_only=True)
class Course:
    """Running means of a positive number, of its logarithm and of the square of what that scatters by."""

    count: int = 0
    mean: float = 0.0
    log: float = 0.0
    scatter: float = 0.0
    above: int = 0
    """Steps in a row that were beyond what is usual."""

    def is_high(self, value: float, limit: float) -> bool:
        """Whether the next value is above the limit, and beyond what this number does by chance."""
        if self.count < LEAST or value <= limit:
            return False
        return math.log(value) - self.log > SIGMAS * math.sqrt(self.scatter)

    def add(self, value: float) -> None:
        """Take the value in; of a spike only a part, so that the next step is judged by what was usual before it.

        A level that stays is usual after some twenty steps.
        """
        if self.count >= LEAST:
            value = min(value, math.exp(self.log + COUNTED * max(math.sqrt(self.scatter), FLOOR)))
        self.count += 1
        weight = max(1 - DECAY, 1 / self.count)
        self.mean += weight * (value - self.mean)
        off = math.log(value) - self.log
        self.log += weight * off
        self.scatter = (1 - weight) * (self.scatter + weight * off * off)


@dataclass
class Rate:
    """The learning rate: the highest that is usual, and for how many steps it has been far above."""

    highest: float = 0.0
    steps: int = 0

    def is_high(self, rate: float, longest: int, *, warm: bool) -> bool:
        """Take a step's rate; whether it has jumped, after the warm-up. One that stays for `longest` steps is usual."""
        if warm and self.highest and rate > RATE_JUMP * self.highest and self.steps < longest:
            self.steps += 1
            return True
        self.highest, self.steps = max(self.highest, rate), 0
        return False


@dataclass
class Spikes:
    """The courses of all layers, and which of them are held."""

    rate: Rate = field(default_factory=Rate)

    courses: dict[str, dict[str, Course]] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)
    """Layer -> the step until which it stays raised."""

    def see(self, step: int, seen: Mapping[str, Gradient], lowered: Collection[str], *, units: int) -> list[Spike]:
        """Take in the gradients of an applied step.

        Args:
            seen: of controlled layers, lowered or not: what is usual is known before a layer is lowered.
            lowered: those that can be raised.
            units: how many layers are controlled.

        Returns:
            The worst spikes, of as many layers as there is room for. They count as held from now on.
        """
        found = [
            spike for name, gradient in seen.items() for spike in self._of_layer(name, gradient) if name in lowered
        ]
        worst: dict[str, Spike] = {}
        for spike in sorted(found, key=lambda spike: -spike.value / spike.limit):
            worst.setdefault(spike.layer, spike)
        self.held = {name: until for name, until in self.held.items() if until > step}
        room = max(1, int(AT_ONCE * units)) - len(self.held)
        made = list(worst.values())[: max(room, 0)]
        self.held |= {spike.layer: step + HELD for spike in made}
        return made

    def _of_layer(self, name: str, gradient: Gradient) -> Iterator[Spike]:
        courses = self.courses.setdefault(name, {})
        for guard, value in ((NORM, gradient.norm), (RMS, gradient.rms)):
            if value is None or not math.isfinite(value) or value <= 0:
                continue
            course = courses.setdefault(guard, Course())
            usual = course.mean
            limit = TIMES_USUAL * usual if guard == NORM else UPDATE_RMS
            course.above = course.above + 1 if course.is_high(value, limit) else 0
            if course.above >= IN_A_ROW[guard]:
                yield Spike(layer=name, guard=guard, value=value, usual=usual, limit=limit)
            course.add(value)

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        courses = {name: {guard: asdict(c) for guard, c in own.items()} for name, own in self.courses.items()}
        return {"courses": courses, "held": dict(self.held), "rate": asdict(self.rate)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.courses = {
            name: {guard: Course(**values) for guard, values in own.items()} for name, own in state["courses"].items()
        }
        self.held, self.rate = dict(state["held"]), Rate(**state["rate"])
