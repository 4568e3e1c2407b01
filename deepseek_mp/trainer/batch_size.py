"""`find_batch_size`: the largest batch whose whole training step fits in the device's memory.

Sizes are tried by making the steps that the trainer would make, in its own precision and with its own optimizer:
forward, loss, backward and update, with the optimizer's state in place. They double until one does not fit, and the gap
is then halved, down to a 64th. Down to an 8th, libraries take the algorithms that they take for the best, instead of
timing all of them for each size (`cudnn.benchmark`), which takes longer than the step. Each is tried as the first step
of a training, which decides by its batch what later ones do, and is counted and measured, beside memory that is to stay
free. What was tried leaves no trace (see `kept_state`), but the trainer knows what was confirmed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deepseek_mp.backends import available_memory_bytes, peak_memory_bytes, reset_peak_memory
from deepseek_mp.controller.memory_choice import Measure
from deepseek_mp.costs.restore import release_memory
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.nn import call as calls
from deepseek_mp.optim.offload import OffloadedOptimizer
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.trainer.assembly import Run, computation, computation_anew
from deepseek_mp.trainer.confirmed_batch import ConfirmedBatch
from deepseek_mp.trainer.loop import MixedPrecisionTrainer
from deepseek_mp.trainer.memory_measures import possible, settings_of
from deepseek_mp.trainer.memory_report import gib_for, in_gib, limit_of
from deepseek_mp.trainer.memory_trials import Gauge, in_force
from deepseek_mp.trainer.trial_steps import FAILURES, TrialSteps, goes_through, progress, trials, unrecorded

log = logging.getLogger("deepseek_mp")

Fits = Callable[[int], bool]
Choose = Callable[[Sequence[Measure]], Sequence[Measure]]
CONFIRMING = 2
"""Steps that the size found is tried with once more."""
NEAR = 64
"""Where steps are made, the search ends with a gap of this part of the size: a step takes seconds, and what the same
step needs differs by as much. A gap of one sample, below 128."""
ROUGH = 8
"""Down to a gap of this part of the size libraries need not time algorithms; those they take may need other memory."""
FIRST_DOWN, STEP_DOWN = 32, 16
"""A size that is not confirmed is made smaller by this part of it: the first time, and each time after that."""
SPARE = 64
"""This part of a device's memory stays free in the steps that are tried: training takes a little more now and then, for
the statistics of a sampled step, workspaces, and gaps between blocks."""


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One size, and whether its step fitted."""

    size: int
    fits: bool
    peak_bytes: int | None = None
    """The most memory in tensors during it; None where that is not counted."""


@dataclass(frozen=True, kw_only=True)
class BatchSize:
    """What `find_batch_size` found."""

    size: int
    """The largest that fits; where steps were made, to within a 64th of it."""
    too_large: int | None
    """The smallest that was tried and does not; None where the limit was reached."""
    tried: tuple[Tried, ...] = field(default=())
    """In order."""
    measures: tuple[str, ...] = ()
    """The ways to save memory that were in force, all there are; the trainer takes those of them that it needs."""
    as_it_was: int | None = None
    """The largest size that fits without them, where there are any; 0: none does."""

    def __str__(self) -> str:
        end = "the limit" if self.too_large is None else f"{self.too_large} does not fit"
        saved = f"; {self.as_it_was} without {', '.join(self.measures)}" if self.measures else ""
        return f"batch size {self.size} ({end}; {len(self.tried)} steps tried{saved})"


def find_batch_size(
    trainer: MixedPrecisionTrainer | Callable[[], MixedPrecisionTrainer],
    make_batch: Callable[[int], Any],
    *,
    start: int = 8,
    limit: int | None = None,
    multiple: int = 1,
    fits: Fits | None = None,
) -> BatchSize:
    """The largest batch whose step fits; model, optimizer, gradients and random generators end as they began.

    The search ends when the sizes that fit and that do not are within a 64th of each other: below 128 samples, and
    with `fits=`, the size is exact. With 'auto', before its plan was measured, the device's recommended format is
    tried. Where the trainer has `memory`, a size fits that its budget allows with all the ways to save memory that the
    trainer may take.

    Example:
        found = find_batch_size(trainer, lambda size: (images[:size], labels[:size]), limit=len(images))

    Args:
        trainer: the trainer, or a function that makes one.
        make_batch: from a size to a batch as for `step`. Where samples differ, give the largest: what fits is known
            of these batches only.
        start: the first size to try; smaller ones are tried only if it does not fit.
        limit: the largest size to try. Needed on a CPU, whose system ends a process that takes too much.
        multiple: sizes are multiples of it.
        fits: asked instead of making steps, from a size to whether it fits.

    Returns:
        `size`, the largest that fits in samples; `too_large`, the smallest tried that does not, None at the limit;
        `tried`, all trials with their peaks in bytes; `measures` and `as_it_was`, with `memory`. It prints as a line.

    Raises:
        ConfigError: an argument that is not allowed, an open accumulation window, or not even the smallest size fits.
    """
    _check(make_batch, start, limit, multiple)
    made = trainer if isinstance(trainer, MixedPrecisionTrainer) else trainer()
    if fits is None and made.device.type == "cpu" and limit is None:
        change = "Pass limit=, the largest batch that you would use"
        raise ConfigError(explain("find_batch_size on a CPU without a limit", "a limit there", change))
    top = None if limit is None else limit // multiple
    first = max(1, start // multiple) if top is None else min(max(1, start // multiple), top)
    if fits is not None:
        asked = _Asked(fits)
        good, bad = _largest(lambda size: asked.fits(size * multiple), first, top)
        return _result(good, bad, multiple, asked.tried)
    limit_bytes = _limit_bytes(made)
    with _trials(made, make_batch, limit_bytes) as trials:
        good, bad = _tried(trials, first, top, multiple)
    made.confirmed = trials.last_confirmed
    if limit_bytes is None or made.memory is not None or bad is None:
        return _result(good, bad, multiple, trials.tried, limit_bytes)
    saving = _Saving(made, make_batch, limit_bytes, good or first, top, multiple)
    more, better, worse = saving.largest()
    tried = [*trials.tried, *more.tried]
    if better <= good:
        return _result(good, bad, multiple, tried, limit_bytes)
    made.confirmed = more.last_confirmed
    return replace(_result(better, worse, multiple, tried), as_it_was=good * multiple, measures=more.measures)


@dataclass(frozen=True)
class _Saving:
    """The search with all there is to save memory; sizes are multiples of `multiple`."""

    trainer: MixedPrecisionTrainer
    make_batch: Callable[[int], Any]
    limit_bytes: int | None
    first: int
    top: int | None
    multiple: int

    def largest(self) -> tuple[_Trials, int, int | None]:
        """What fits. Where a step fails otherwise, what it fails with is said, and done without.

        First without counting, if PyTorch's backward has lost the error; then without the ways with which no step can
        be made.
        """
        counted = True
        try:
            return self._search(())
        except FAILURES as error:
            _said("all there is to save memory", error)
            counted = not isinstance(error, SystemError)
        if not counted:
            try:
                return self._search((), counted=False)
            except FAILURES as error:
                _said("all there is to save memory, not counted", error)
        return self._search(self._impossible(counted=counted), counted=counted)

    def _search(self, left_out: Collection[str], *, counted: bool = True) -> tuple[_Trials, int, int | None]:
        with _trials(self.trainer, self.make_batch, self.limit_bytes, _all_but(left_out), counted=counted) as made:
            return made, *_tried(made, self.first, self.top, self.multiple)

    def _impossible(self, *, counted: bool) -> set[str]:
        """The ways with which no step of the first size can be made, whether or not it fits; each is said."""
        with trials(self.trainer, "find_batch_size") as plan:
            measures = possible(self.trainer, plan)[0]
        found: set[str] = set()
        for measure in measures:
            way = partial(_way_to, measure)
            try:
                with _trials(self.trainer, self.make_batch, self.limit_bytes, way, counted=counted) as alone:
                    alone.fits(self.first * self.multiple)
            except FAILURES as error:
                _said(measure.name, error)
                found.add(measure.name)
        return found


def _said(what: str, error: BaseException) -> None:
    log.warning("find_batch_size: no step can be made with %s: %s: %s", what, type(error).__name__, error)


def _all_but(left_out: Collection[str]) -> Choose:
    return lambda measures: [one for one in measures if not {way.name for way in _way_to(one, measures)} & {*left_out}]


def _way_to(measure: Measure, measures: Sequence[Measure]) -> list[Measure]:
    """It, behind those that it builds on."""
    return [*(one for other in measures if other.name == measure.after for one in _way_to(other, measures)), measure]


def _tried(trials: _Trials, first: int, top: int | None, multiple: int) -> tuple[int, int | None]:
    """The largest number of multiples that steps were made with, and the smallest that did not fit."""
    while not trials.warm_up(first * multiple) and first > 1:
        first //= 2
    roughly = _largest(lambda size: trials.fits(size * multiple, rough=True), first, top, near=ROUGH)
    good, bad = _largest(lambda size: trials.fits(size * multiple), first, top, near=NEAR, known=roughly)
    down = FIRST_DOWN
    while good and not trials.confirmed(good * multiple):
        good, bad, down = good - max(1, good // down), good, STEP_DOWN
    return good, bad


def _limit_bytes(trainer: MixedPrecisionTrainer) -> int | None:
    """What a step may hold where the trainer has a budget."""
    if trainer.config.memory is None:
        return None
    if trainer.memory is not None:
        return trainer.memory.limit_bytes
    return limit_of(trainer.config.memory, available_memory_bytes(trainer.device))


def _none_fits(multiple: int, tried: list[Tried], limit_bytes: int | None) -> ConfigError:
    """The error that says what the smallest batch needs, where that is known."""
    passed = f"a batch of {multiple}, the smallest that may be tried, which does not fit"
    change = "Free memory, or make the model smaller"
    peaks = [one.peak_bytes for one in tried if one.size == multiple and one.peak_bytes is not None]
    if limit_bytes is not None:
        passed += f" into {in_gib(limit_bytes)}"
    if limit_bytes is not None and peaks:
        passed += f": its step needs {in_gib(min(peaks))} with all there is"
        change = f"Pass memory={gib_for(min(peaks)):g} or more, or make the model smaller"
    return ConfigError(explain(passed, "a model whose step fits with that", change))


def _result(good: int, bad: int | None, multiple: int, tried: list[Tried], limit_bytes: int | None = None) -> BatchSize:
    if not good:
        raise _none_fits(multiple, tried, limit_bytes)
    too_large = None if bad is None else bad * multiple
    found = BatchSize(size=good * multiple, too_large=too_large, tried=tuple(tried))
    log.info("%s", found)
    return found


def _largest(
    fits: Fits, first: int, top: int | None, *, near: int | None = None, known: tuple[int, int | None] = (0, None)
) -> tuple[int, int | None]:
    """The largest size that fits, 0 if none does, and the smallest known not to; None if `top`, the last to try, fits.

    What fits is taken to fit for every smaller size too. With `near` the two may be that part of the size apart;
    `known` are the two that a search has found before.
    """
    good, bad = known
    while good != top and (bad is None or bad - good > max(1, good // near if near else 1)):
        size = (good + bad) // 2 if bad is not None else 2 * good or first
        size = size if top is None else min(size, top)
        if fits(size):
            good = size
        else:
            bad = size
    return good, bad


class _Asked:
    """Sizes that the caller's own function was asked about."""

    def __init__(self, fits: Fits) -> None:
        self._fits = fits
        self.tried: list[Tried] = []

    def fits(self, size: int) -> bool:
        self.tried.append(Tried(size=size, fits=bool(self._fits(size))))
        return self.tried[-1].fits


class _Trials:
    """Makes training steps of a size and sees whether memory suffices."""

    def __init__(
        self,
        trainer: MixedPrecisionTrainer,
        steps: TrialSteps,
        make_batch: Callable[[int], Any],
        limit_bytes: int | None,
        measures: tuple[str, ...],
    ) -> None:
        self._trainer, self._device, self._make_batch = trainer, trainer.device, make_batch
        self._steps, self._limit_bytes = steps, limit_bytes
        optimizer = trainer.optimizer
        self._fresh = None if isinstance(optimizer, OffloadedOptimizer) else _before_steps(optimizer)
        """The optimizer's state, if it has made no steps, and the device holds it."""
        self.measures = measures
        """Names of those in force."""
        self.tried: list[Tried] = []
        self.last_confirmed: ConfirmedBatch | None = None
        self._samples = 0
        """Of the batch that was made last."""
        self._exact: int | None = None
        """The first size whose batch had as many samples as were asked for."""
        self._short = False

    def warm_up(self, size: int) -> bool:
        """Whether steps of this size fit; they are made until one is applied."""
        return self._steps.warm_up(lambda: self.fits(size, rough=True))

    def confirmed(self, size: int) -> bool:
        """Whether steps of this size go through one after the other.

        An optimizer that has made no steps gets its state in them, as in a training: where in memory that comes to lie
        is part of what the second step finds.
        """
        if self._fresh is not None:
            state = self._trainer.optimizer.state
            state.clear()
            state.update({parameter: dict(kept) for parameter, kept in self._fresh.items()})
        fits = self.fits(size, steps=CONFIRMING)
        if fits:
            self.last_confirmed = ConfirmedBatch(
                samples=self._samples,
                measures=self.measures,
                peak_bytes=self.tried[-1].peak_bytes,
                limit_bytes=self._limit_bytes,
            )
        return fits

    def fits(self, size: int, *, steps: int = 1, rough: bool = False) -> bool:
        """Whether so many steps of this size go through beside what is to stay free, within the budget if there is one.

        Memory goes back to the device before: what is left of other sizes cuts it into pieces.

        Args:
            size: of the batch.
            steps: that are made.
            rough: libraries need not time their algorithms.
        """
        begun = time.perf_counter()
        self._steps.begin_anew(rough=rough)
        release_memory(self._device)
        held = _held_bytes(self._device)
        spare: list[Tensor | None] = []
        fits, peak = False, None
        try:
            if goes_through(lambda: spare.append(_spare(self._device)), self._device):
                fits, peak = self._measured(size, steps, beside=sum(one.nbytes for one in spare if one is not None))
        finally:
            spare.clear()
        self.tried.append(Tried(size=size, fits=fits, peak_bytes=peak))
        progress.info(
            "find_batch_size: %d samples %s, %s%s: %s%s, %.1f s%s",
            size,
            "roughly" if rough else f"{steps} x",
            "fit" if fits else "do not fit",
            "" if self._limit_bytes is None else f" into {in_gib(self._limit_bytes)}",
            "peak unknown" if peak is None else in_gib(peak),
            "" if held is None else f", {in_gib(held)} held before",
            time.perf_counter() - begun,
            f"; with {', '.join(self.measures)}" if self.measures else "",
        )
        return fits

    def _measured(self, size: int, steps: int, *, beside: int) -> tuple[bool, int | None]:
        """Whether the steps go through, and the most memory in tensors meanwhile.

        Args:
            beside: bytes that are held and are no part of a step, nor of the budget.
        """
        peak: int | None = None

        def step() -> None:
            for number in range(1, steps + 1):
                batch = self._make_batch(size)
                self._count(batch, size)
                self._steps.step(batch, settle=number == steps)
                del batch

        def measured() -> None:
            nonlocal peak
            found = Gauge().peak(step, self._trainer)
            peak = None if found is None else found - beside

        if self._limit_bytes is not None:
            return goes_through(measured, self._device) and peak is not None and peak <= self._limit_bytes, peak
        reset_peak_memory(self._device)
        fits = goes_through(step, self._device)
        found = None if self._device.type == "cpu" else peak_memory_bytes(self._device)
        return fits, None if found is None else found - beside

    def _count(self, batch: Any, size: int) -> None:
        """Note how many samples the batch has, and say so once if its data have run out.

        A batch whose first dimension is none of samples has the same length whatever its size is.
        """
        self._samples = calls.batch_size(calls.parse_batch(batch))
        if self._samples == size:
            self._exact = self._exact or size
        elif not self._short and self._exact is not None and self._exact != self._samples < size:
            self._short = True
            said = "find_batch_size: make_batch gave %d samples for a batch of %d: no more than these are tried. "
            log.warning(said + "Give it as many as it is asked for, or pass limit=", self._samples, size)


def _before_steps(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]] | None:
    """What it keeps of parameters before its first step, such as how they are stored; None once it has made one."""
    if any(isinstance(value, Tensor) for state in optimizer.state.values() for value in state.values()):
        return None
    return {parameter: dict(state) for parameter, state in optimizer.state.items()}


def _held_bytes(device: torch.device) -> int | None:
    """In tensors now; None on a CPU."""
    if device.type == "cpu" or not reset_peak_memory(device):
        return None
    return peak_memory_bytes(device)


def _spare(device: torch.device) -> Tensor | None:
    """Memory that nothing else may have while this is held; None on a CPU."""
    if device.type == "cpu":
        return None
    free = available_memory_bytes(device)
    return None if free is None else torch.empty(free // SPARE, dtype=torch.uint8, device=device)


@contextmanager
def _trials(
    trainer: MixedPrecisionTrainer,
    make_batch: Callable[[int], Any],
    limit_bytes: int | None,
    chosen: Choose | None = None,
    *,
    counted: bool = True,
) -> Iterator[_Trials]:
    """Inside steps can be tried, as they are or with what is chosen to save memory; afterwards all is as it was."""
    with trials(trainer, "find_batch_size") as plan:
        names = () if chosen is None else tuple(measure.name for measure in chosen(possible(trainer, plan)[0]))
        with _steps(trainer, plan, names, saves=chosen is not None, counted=counted) as steps:
            yield _Trials(trainer, steps, make_batch, limit_bytes, names)


@contextmanager
def _steps(
    trainer: MixedPrecisionTrainer, plan: PrecisionPlan, names: tuple[str, ...], *, saves: bool, counted: bool
) -> Iterator[TrialSteps]:
    with unrecorded(trainer):
        if saves:
            settings = settings_of(names, counted=counted and not trainer.config.compile)
            with in_force(trainer, plan, settings, lambda: computation(trainer, plan)) as steps:
                yield steps
            return
        compute, counted = _compute(trainer, plan)
        with closing(TrialSteps(trainer, plan, compute, counted=counted)) as steps:
            yield steps


def _compute(trainer: MixedPrecisionTrainer, plan: PrecisionPlan) -> tuple[Run, bool]:
    """What computes the trainer's next step, and whether that is counted."""
    if not trainer.has_stepper:
        return computation(trainer, plan), True
    compute, counted = trainer.stepper.compute, trainer.stepper.counts
    if not trainer.stepper.windows_opened:  # what it decides by its first batch it must not decide by one that is tried
        compute = computation_anew(trainer, plan, compute)
    return compute, counted


def _check(make_batch: object, start: int, limit: int | None, multiple: int) -> None:
    if not callable(make_batch):
        passed = f"make_batch of type {type(make_batch).__name__}"
        change = "Pass for example lambda size: (images[:size], labels[:size])"
        raise ConfigError(explain(passed, "a function from a size to a batch", change))
    for name, value in (("start", start), ("multiple", multiple), ("limit", limit)):
        if value is None and name == "limit":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(explain(f"{name}={value!r}", "a whole number from 1", f"Change {name}"))
    if limit is not None and limit < multiple:
        passed = f"limit={limit} with multiple={multiple}"
        raise ConfigError(explain(passed, "a limit that is no smaller than multiple", "Change one of them"))
