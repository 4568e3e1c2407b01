"""The choice among formats: which trial to make next, and which candidate its numbers favour.

No time is taken here: both functions are pure, so that every tie, failure and missing number can be
tested with made-up timings.

Two numbers describe a candidate. `layers_ms` adds up the timings of its units, is quick to get and
blind to everything between units; `step_ms` is a whole forward and backward. A step outranks layers:
layer timings only say which steps are worth timing, and decide where a step could not be timed. They
are also evidence enough against FP32 where it loses by a wide margin and its step is long.

The rules, in order:

1. A candidate that failed (memory, an error, a loss that is not finite) is out.
2. The fastest wins, but within 2 % the preferred one does: higher precision first (FP32, then TF32 or
   HF32, then BF16, which needs no loss scale, then FP16, then FP8), then contiguous memory.
3. Nothing below FP32 wins unless a number of the same kind says that it is faster than FP32.

FP32 here is plain FP32: in the memory format the model has, as it would run without this package.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from deepseek_mp.precision import Reason
from deepseek_mp.precision.plan import MemoryFormat

TIE = 1.02
"""Times closer than this ratio are equal: the spread of a step's median from run to run."""
CLEARLY_SLOWER = 1.5
"""FP32 that loses by this ratio in its layers is not timed as a whole step, if that would take long."""
ENOUGH_COVERAGE = 0.5
"""Share of the multiply-adds that must have been timed for layers to speak for the step."""
CHEAP_S = 2.0
"""A trial of FP32 expected to be shorter than this is always made."""

PREFERENCE = ("fp32", "tf32", "hf32", "bf16", "fp16")
"""The plain formats; a scaled recipe comes after all of them."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A format, or a scaled recipe, for the whole model together with a memory format."""

    format: str
    memory_format: MemoryFormat = "contiguous"
    kept: frozenset[str] = frozenset()
    """With a scaled recipe: layers that keep the format of its region, because they are faster in that."""

    @property
    def key(self) -> str:
        """Its name in evidence: `bf16`, `bf16_channels_last`."""
        return self.format if self.memory_format == "contiguous" else f"{self.format}_{self.memory_format}"

    @property
    def preference(self) -> tuple[int, bool]:
        """Sorts the preferred of two equally fast candidates first."""
        rank = PREFERENCE.index(self.format) if self.format in PREFERENCE else len(PREFERENCE)
        return rank, self.memory_format != "contiguous"


PLAIN = Candidate(format="fp32")
"""FP32 as a model runs without any plan, unless it is in channels_last."""


class Failure(StrEnum):
    """Why a candidate cannot be used."""

    DOES_NOT_FIT = "out of memory"
    ERROR = "error"
    NOT_FINITE = "loss not finite"

    @property
    def reason(self) -> Reason:
        """The reason of a plan that keeps FP32 because of it."""
        reasons = {Failure.DOES_NOT_FIT: Reason.DOES_NOT_FIT, Failure.ERROR: Reason.NO_KERNEL}
        return reasons.get(self, Reason.MEASURED_SLOWER)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What is known of a candidate; None where it was not measured."""

    candidate: Candidate
    layers_ms: float | None = None
    step_ms: float | None = None
    seconds: float = 0.0
    """How long the whole-step trial took, warm-up and the search for algorithms included."""
    failure: Failure | None = None
    detail: str = ""
    """The message of the error."""

    @property
    def is_fp32(self) -> bool:
        return self.candidate.format == "fp32"

    @property
    def is_measured(self) -> bool:
        return self.step_ms is not None or self.layers_ms is not None

    @property
    def rank(self) -> tuple[float, int, bool]:
        """Sorts by layer timings, then by preference."""
        return (self.layers_ms or 0.0, *self.candidate.preference)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The chosen candidate and why."""

    candidate: Candidate
    reason: Reason
    detail: str


def next_trial(trials: Iterable[Trial], *, coverage: float, plain: Candidate = PLAIN) -> Candidate | None:
    """The candidate whose whole step is to be timed next, or None when enough is known.

    The best by layers first, then plain FP32 unless it is clearly slower, then the second best; where
    no layer was timed, all of them. `coverage` is the share of multiply-adds whose layers were timed.
    """
    alive = sorted(_alive(trials), key=lambda trial: trial.rank)
    stepped = [trial for trial in alive if trial.step_ms is not None]
    if not stepped:
        return alive[0].candidate if alive else None
    waiting = [trial for trial in alive if trial.step_ms is None]
    if any(trial.candidate == plain and _is_open(trial, stepped[0], coverage) for trial in waiting):
        return plain
    contenders = alive if any(trial.layers_ms is None for trial in alive) else alive[:2]
    return next((t.candidate for t in contenders if t in waiting and t.candidate != plain), None)


def expected_seconds(trials: Iterable[Trial], candidate: Candidate) -> float:
    """How long a trial of `candidate` would take, judged by those made; 0 before the first."""
    known = {trial.candidate: trial for trial in trials}
    layers_ms = known[candidate].layers_ms
    return max(
        trial.seconds * (max(1.0, layers_ms / trial.layers_ms) if layers_ms and trial.layers_ms else 1.0)
        for trial in known.values()
    )


def decide(trials: Iterable[Trial], *, plain: Candidate = PLAIN) -> Verdict:
    """The candidate to train in: never one below FP32 that no number shows to be faster than FP32.

    Where every candidate failed, the leanest that only lacked memory is kept, so that training itself
    reports what is wrong. Without a trial of FP32 (the model refuses it) the fastest wins.
    """
    known = list(trials)
    alive = _alive(known)
    fp32s = [trial for trial in alive if trial.is_fp32]
    if not alive:
        return _nothing_works(known)
    if not fp32s:
        best = _preferred(_times(alive, "step_ms") or _times(alive, "layers_ms") or [(0.0, trial) for trial in alive])
    elif any(trial.candidate == plain and trial.step_ms is not None for trial in fp32s):
        best = _preferred(_times(alive, "step_ms"))
    else:
        best = _without_fp32_step(alive, fp32s)
    return _explain(best, known)


def _alive(trials: Iterable[Trial]) -> list[Trial]:
    """The trials that may still win; a format that ran out of memory is out in both memory formats."""
    known = list(trials)
    starved = {trial.candidate.format for trial in known if trial.failure is Failure.DOES_NOT_FIT}
    return [
        trial
        for trial in known
        if trial.failure is None and (trial.step_ms is not None or trial.candidate.format not in starved)
    ]


def _is_open(plain: Trial, best: Trial, coverage: float) -> bool:
    """Whether the whole step of plain FP32 still has to be timed."""
    if not plain.layers_ms or not best.layers_ms or coverage < ENOUGH_COVERAGE:
        return True
    ratio = plain.layers_ms / best.layers_ms
    return ratio < CLEARLY_SLOWER or best.seconds * ratio <= CHEAP_S


def _times(trials: list[Trial], kind: Literal["step_ms", "layers_ms"]) -> list[tuple[float, Trial]]:
    """The trials that have this number, with it."""
    return [(getattr(trial, kind), trial) for trial in trials if getattr(trial, kind) is not None]


def _preferred(timed: list[tuple[float, Trial]]) -> Trial:
    """The preferred one of those within the margin of the fastest."""
    limit = TIE * min(ms for ms, _ in timed)
    return min((trial for ms, trial in timed if ms <= limit), key=lambda trial: trial.candidate.preference)


def _without_fp32_step(alive: list[Trial], fp32s: list[Trial]) -> Trial:
    """The best where plain FP32 has no step: a lower format's step counts if its layers beat FP32's."""
    timed = _times(alive, "layers_ms")
    fp32_ms = min((ms for ms, trial in timed if trial.is_fp32), default=None)
    if fp32_ms is None:
        return min(fp32s, key=lambda trial: trial.rank)
    faster = [trial for ms, trial in timed if ms * TIE < fp32_ms]
    return _preferred(_times([*faster, *fp32s], "step_ms") or timed)


def _explain(best: Trial, known: list[Trial]) -> Verdict:
    """The verdict for the chosen trial, with the numbers that speak for it."""
    lower = [trial for trial in known if not trial.is_fp32]
    failed = [trial for trial in lower if trial.failure is not None]
    if not best.is_fp32:
        reason = Reason.MEASURED_FASTEST if best.is_measured else Reason.DOES_NOT_FIT
    elif lower and len(failed) == len(lower):
        first = min(failed, key=lambda trial: trial.candidate.preference)
        assert first.failure is not None
        reason, message = first.failure.reason, first.detail
        return Verdict(candidate=best.candidate, reason=reason, detail=f"{_numbers(known)} {message}".rstrip())
    else:
        reason = Reason.MEASURED_SLOWER if any(trial.is_measured for trial in lower) else Reason.RECOMMENDED
    return Verdict(candidate=best.candidate, reason=reason, detail=_numbers(known) or "nothing could be timed")


def _nothing_works(known: list[Trial]) -> Verdict:
    """All failed: the lowest format that ran out of memory rather than raised another error."""
    starved = [trial for trial in known if trial.failure is Failure.DOES_NOT_FIT] or known
    leanest = max(starved, key=lambda trial: (trial.candidate.preference[0], not trial.candidate.preference[1]))
    return Verdict(candidate=leanest.candidate, reason=Reason.DOES_NOT_FIT, detail=_numbers(known))


def _numbers(known: list[Trial]) -> str:
    """The trials in words: whole steps, else layers, and failures."""
    steps = [f"{trial.candidate.key} {ms:.3g} ms" for ms, trial in _times(known, "step_ms")]
    layers = [f"{trial.candidate.key} {ms:.3g} ms" for ms, trial in _times(known, "layers_ms")]
    failed = [f"{trial.candidate.key}: {trial.failure}" for trial in known if trial.failure]
    parts = [f"{name} {', '.join(words)}" for name, words in (("step", steps), ("layers", layers)) if words]
    return "; ".join(parts + failed)
