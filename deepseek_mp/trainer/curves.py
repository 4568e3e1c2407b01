"""The curve of a run in one precision, and whether it keeps to that of a baseline: loss and gradient norms, by step.

Both runs have seen the same batches, so most of the noise of their losses is the same, and what remains is
smoothed. A run in a lower precision is not asked to give equal losses, which two orders of addition would not
give either, but losses that are not worse, and gradients that neither grow away nor die.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from deepseek_mp.trainer.result import StepFacts

FEW_STEPS = 8
"""Ratios of gradient norms below which no trend is looked for, and skipped steps that a loss scale may always take."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far a curve may be from its baseline's."""

    tolerance: float = 0.05
    """Relative: smoothed losses may exceed the baseline's by this share of them."""
    gradient_factor: float = 2.0
    """The median ratio of gradient norms lies between 1 / factor and factor; from the first to the last quarter it
    grows by less than the factor, and falls by less than its square."""
    floor: float = 0.01
    """Losses are compared relative to at least this share of the first, so that a run which has learned all there is
    to learn is not judged by the last digits of nothing."""
    skipped: float = 0.05
    """Share of the steps that the search for a loss scale may skip, beside a few at the start."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One step of a run. The loss is NaN or infinite where it was so; `grad_norm` is None where there was no step."""

    step: int
    loss: float
    grad_norm: float | None
    scale: float
    applied: bool
    first_bad_module: str | None = None

    @classmethod
    def of(cls, step: int, facts: StepFacts) -> Point:
        return cls(
            step=step,
            loss=facts.loss,
            grad_norm=facts.grad_norm,
            scale=facts.scale,
            applied=facts.status == "applied",
            first_bad_module=facts.first_bad_module,
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a run is good, why, and the numbers that say so; a number is None where nothing could be compared."""

    good: bool
    reason: str
    worst_loss: float | None = None
    """Largest relative excess of the smoothed loss over the baseline's; negative if it was lower throughout."""
    worst_step: int | None = None
    final_loss: float | None = None
    """Relative excess at the end."""
    gradient_ratio: float | None = None
    """Median of the gradient norms over those of the baseline."""
    gradient_growth: float | None = None
    """Their ratio in the last quarter of the steps over that in the first."""

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


def judge_baseline(points: Sequence[Point]) -> Verdict:
    """Whether a run can be a baseline: it ended with finite losses, and applied most of its steps."""
    finite = [point for point in points if math.isfinite(point.loss)]
    applied = sum(point.applied for point in points)
    if not finite or not math.isfinite(points[-1].loss):
        where = f" at step {points[-1].step}" if points else ""
        return Verdict(good=False, reason=f"the loss is not finite{where}{_culprit(points[-1:])}")
    if 2 * applied < len(points):
        return Verdict(good=False, reason=f"only {applied} of {len(points)} steps could be applied")
    return Verdict(good=True, reason=f"the baseline: loss {points[0].loss:.4g} to {tail_mean(points):.4g}")


def judge(points: Sequence[Point], baseline: Sequence[Point], limits: Limits) -> Verdict:
    """Compare a run with its baseline, step by step; the first rule that is broken is the reason.

    1. No loss is infinite or NaN where the baseline's is not, and no gradient norm either. Only where the loss is
       scaled may gradients overflow: that is how the scale is found.
    2. The smoothed loss exceeds the baseline's at no step by more than the tolerance, nor does the mean of the last
       steps. A step that was skipped delays a run: it is compared with the steps since which it lags behind.
    3. The ratio of the gradient norms has a median within the factor, and does not grow by more than it.
    """
    broken = not_finite(points, baseline, limits)
    if broken:
        return Verdict(good=False, reason=broken)
    loss = _losses(points, baseline, limits)
    gradients = _gradients(points, baseline, limits)
    numbers = loss.numbers | gradients.numbers
    found = loss.broken or gradients.broken
    if found:
        return Verdict(good=False, reason=found, **numbers)
    return Verdict(good=True, reason="; ".join(filter(None, (loss.text, gradients.text))), **numbers)


def not_finite(points: Sequence[Point], baseline: Sequence[Point], limits: Limits) -> str:
    """What is infinite or NaN and should not be; empty if nothing is."""
    fine = {point.step for point in baseline if point.applied}
    skipped = [point for point in points if not point.applied and point.step in fine]
    for point in skipped:
        if not math.isfinite(point.loss):
            return f"the loss is {point.loss} at step {point.step}{_culprit([point])}, where the baseline's is finite"
        if point.scale == 1.0:
            return f"the gradients are not finite at step {point.step}{_culprit([point])}, where the baseline's are"
    allowed = FEW_STEPS + limits.skipped * len(points)
    if len(skipped) > allowed:
        return f"{len(skipped)} of {len(points)} steps were skipped while a loss scale was looked for"
    return ""


def window(steps: int) -> int:
    """Steps that losses are smoothed over, in a run of `steps`: a twentieth, at least 5."""
    return max(5, steps // 20)


def smoothed(values: Iterable[float], span: int) -> list[float]:
    """Exponential moving average with the weights of a mean of `span` values, without a bias to its start.

    y_t = sum_i d^i x_(t-i) / sum_i d^i with d = 1 - 2 / (span + 1): each value is a mean of those so far.
    """
    decay = 1 - 2 / (span + 1)
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = decay * total + value, decay * weight + 1
        means.append(total / weight)
    return means


def tail_mean(points: Sequence[Point]) -> float:
    """Mean of the finite losses among the last steps, as many as are smoothed over."""
    losses = [point.loss for point in points if math.isfinite(point.loss)]
    last = losses[-window(len(points)) :]
    return sum(last) / len(last) if last else math.nan


@dataclass(frozen=True, kw_only=True)
class _Finding:
    """One comparison: its numbers, what it found wrong (or nothing), and in words what it found."""

    numbers: dict[str, Any]
    broken: str = ""
    text: str = ""


def _losses(points: Sequence[Point], baseline: Sequence[Point], limits: Limits) -> _Finding:
    pairs = _shared(points, baseline)
    if not pairs:
        return _Finding(numbers={}, broken="no step can be compared: no loss of both runs is finite")
    span = window(len(pairs))
    ours = smoothed((point.loss for point, _ in pairs), span)
    theirs = smoothed((base.loss for _, base in pairs), span)
    lags = _lags(pairs)
    least = limits.floor * abs(theirs[0])
    excesses = [
        (_excess(our, max(theirs[max(index - lag, 0) : index + 1]), least), index)
        for index, (our, lag) in enumerate(zip(ours, lags, strict=True))
        if index >= min(span, len(pairs)) - 1
    ]
    worst, index = max(excesses)
    final = _final(pairs, span, lags[-1], least)
    numbers = {"worst_loss": worst, "worst_step": pairs[index][0].step, "final_loss": final}
    allowed = f"more than {100 * limits.tolerance:.3g} %"
    if worst > limits.tolerance:
        where = f"step {pairs[index][0].step} ({ours[index]:.4g} and {theirs[index]:.4g}, smoothed over {span} steps)"
        broken = f"the loss is {100 * worst:.3g} % above the baseline's at {where}, {allowed}"
        return _Finding(numbers=numbers, broken=broken)
    if final > limits.tolerance:
        broken = f"the mean loss of the last {span} steps is {100 * final:.3g} % above the baseline's, {allowed}"
        return _Finding(numbers=numbers, broken=broken)
    text = f"loss at most {100 * worst:+.2g} % from the baseline's, {100 * final:+.2g} % at the end"
    return _Finding(numbers=numbers, text=text)


def _gradients(points: Sequence[Point], baseline: Sequence[Point], limits: Limits) -> _Finding:
    ratios = [
        point.grad_norm / base.grad_norm
        for point, base in _shared(points, baseline)
        if point.applied and base.applied and point.grad_norm is not None and base.grad_norm
    ]
    if not ratios:
        return _Finding(numbers={})
    factor, middle = limits.gradient_factor, median(ratios)
    quarter = len(ratios) // 4
    growth = None
    if len(ratios) >= FEW_STEPS and median(ratios[:quarter]) > 0:
        growth = median(ratios[-quarter:]) / median(ratios[:quarter])
    numbers = {"gradient_ratio": middle, "gradient_growth": growth}
    if not 1 / factor <= middle <= factor:
        broken = f"gradient norms are {middle:.3g} times the baseline's (median), not within a factor of {factor:g}"
        return _Finding(numbers=numbers, broken=broken)
    if growth is not None and not 1 / factor**2 <= growth <= factor:
        moved = f"grew {growth:.3g} times" if growth > factor else f"fell to {growth:.3g} of what they were"
        broken = f"gradient norms {moved} against the baseline's from the first to the last quarter"
        return _Finding(numbers=numbers, broken=broken)
    return _Finding(numbers=numbers, text=f"gradient norms {middle:.3g} times the baseline's")


def _shared(points: Sequence[Point], baseline: Sequence[Point]) -> list[tuple[Point, Point]]:
    """The points of steps whose losses are finite in both."""
    bases = {base.step: base for base in baseline if math.isfinite(base.loss)}
    return [(point, bases[point.step]) for point in points if math.isfinite(point.loss) and point.step in bases]


def _lags(pairs: Sequence[tuple[Point, Point]]) -> list[int]:
    """By how many updates a run is behind its baseline, before each step."""
    lag, lags = 0, []
    for point, base in pairs:
        lags.append(max(lag, 0))
        lag += base.applied - point.applied
    return lags


def _final(pairs: Sequence[tuple[Point, Point]], span: int, lag: int, least: float) -> float:
    """The relative excess of the mean loss of the last `span` steps."""
    span = min(span, len(pairs))
    ours = sum(point.loss for point, _ in pairs[-span:]) / span
    bases = [base.loss for _, base in pairs]
    starts = {len(bases) - span, max(len(bases) - span - lag, 0)}
    return _excess(ours, max(sum(bases[start : start + span]) / span for start in starts), least)


def _excess(ours: float, theirs: float, least: float) -> float:
    """(ours - theirs) over |theirs|, or over `least` if that is more."""
    difference, scale = ours - theirs, max(abs(theirs), least)
    return difference / scale if difference else 0.0


def _culprit(points: Sequence[Point]) -> str:
    module = next((point.first_bad_module for point in points if point.first_bad_module), None)
    return f" (first bad module: {module!r})" if module else ""
