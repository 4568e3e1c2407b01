"""The course of the loss: how fast it falls, and whether it jumped."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from statistics import median
from typing import Any

WINDOW = 128
"""Losses that a jump is judged by."""
LEAST = 32
"""As many must have been seen before a jump can be one."""
SIGMAS = 6.0
"""Robust standard deviations above the median of the logarithm."""
RATIO = 1.5
"""And at least so many times the median."""
IN_A_ROW = 2
NORMAL_MAD = 1.4826
"""Standard deviations of a normal distribution in its median absolute deviation."""
LEAST_MARKS = 16
"""Points that a slope is drawn through, at least."""
MARKS = 64
"""Points kept of the whole run, for its slope."""


@dataclass(frozen=True)
class Slope:
    """How much the loss falls in a step, and the standard error of that."""

    fall: float
    error: float


class LossTrend:
    """Fed one loss a step; keeps a window, and a coarse course of the whole run."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._above = 0
        self._marks: list[tuple[int, float]] = []
        self._every = 1
        self._sum, self._count = 0.0, 0

    def see(self, step: int, loss: float) -> bool:
        """Take the loss of an applied step; True where it has jumped.

        A loss that stays high is the new normal after a window's length. Losses that are not finite or not positive say
        nothing here.
        """
        if not (math.isfinite(loss) and loss > 0):
            return False
        jumped = self._is_high(loss)
        self._above = self._above + 1 if jumped else 0
        self._recent.append(loss)
        self._mark(step, loss)
        return self._above >= IN_A_ROW

    def slope(self) -> Slope | None:
        """How much the loss falls in a step, over the last part of the run so far; None before that can be told.

        The line of least squares through the means of the last quarter, but of `LEAST_MARKS` at least.
        """
        if len(self._marks) < LEAST_MARKS:
            return None
        last_step, _ = self._marks[-1]
        quarter = [mark for mark in self._marks if mark[0] >= 0.75 * last_step]
        recent = quarter if len(quarter) >= LEAST_MARKS else self._marks[-LEAST_MARKS:]
        steps, losses = _mean(mark[0] for mark in recent), _mean(mark[1] for mark in recent)
        spread = math.fsum((step - steps) ** 2 for step, _ in recent)
        fall = -math.fsum((step - steps) * (loss - losses) for step, loss in recent) / spread
        left = math.fsum((loss - losses + fall * (step - steps)) ** 2 for step, loss in recent)
        return Slope(fall=fall, error=math.sqrt(left / (len(recent) - 2) / spread))

    def _is_high(self, loss: float) -> bool:
        if len(self._recent) < LEAST:
            return False
        logs = [math.log(value) for value in self._recent]
        middle = median(logs)
        sigma = NORMAL_MAD * median(abs(value - middle) for value in logs)
        above = math.log(loss) - middle
        return above > math.log(RATIO) and above > SIGMAS * sigma

    def _mark(self, step: int, loss: float) -> None:
        """A mean of `_every` losses; when there are too many marks, every two become one."""
        self._sum += loss
        self._count += 1
        if self._count < self._every:
            return
        self._marks.append((step, self._sum / self._count))
        self._sum, self._count = 0.0, 0
        if len(self._marks) >= 2 * MARKS:
            pairs = zip(self._marks[::2], self._marks[1::2], strict=True)
            self._marks = [(b[0], (a[1] + b[1]) / 2) for a, b in pairs]
            self._every *= 2

    def state_dict(self) -> dict[str, Any]:
        return {
            "recent": list(self._recent),
            "above": self._above,
            "marks": [list(mark) for mark in self._marks],
            "every": self._every,
            "sum": self._sum,
            "count": self._count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._recent = deque(state["recent"], maxlen=WINDOW)
        self._above = state["above"]
        self._marks = [(int(step), float(loss)) for step, loss in state["marks"]]
        self._every, self._sum, self._count = state["every"], state["sum"], state["count"]


def _mean(values: Any) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)
