"""Makes a training step fit into memory (`memory=`): tries steps with each way to save some, and takes what is needed.

Steps are whole ones, of the batch that training begins with and in the trainer's own precision, as `find_batch_size`
makes them. Where not even a step as it is goes through, measures are weighed on the largest part of the batch, by
halves, with which one does; whether a set of them suffices is always tried on the batch itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from deepseek_mp.backends import available_memory_bytes
from deepseek_mp.controller.memory_choice import Chosen, Known, Measure, Trial, Weighed, choose, weigh
from deepseek_mp.costs.memory import optimizer_tensors, peak_during
from deepseek_mp.costs.restore import release_memory
from deepseek_mp.costs.timing import time_call
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.nn import call as calls
from deepseek_mp.optim.offload import OffloadedOptimizer
from deepseek_mp.precision import Decision, PrecisionPlan, Reason
from deepseek_mp.trainer.assembly import Run, computation
from deepseek_mp.trainer.batch_part import first_samples
from deepseek_mp.trainer.confirmed_batch import ConfirmedBatch
from deepseek_mp.trainer.fused_loss import SMALL
from deepseek_mp.trainer.memory_measures import UNCOUNTED, Settings, possible, put_in_force, settings_of
from deepseek_mp.trainer.memory_report import MemoryLine, MemoryReport, gib_for, in_gib, limit_of, lines_of
from deepseek_mp.trainer.trial_steps import FAILURES, TrialSteps, goes_through, progress, trials, unrecorded

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer

log = logging.getLogger("deepseek_mp")

TIMED = 3
"""Steps that are timed in a trial; the shortest counts, since what disturbs a step only makes it longer."""


class Gauge:
    """What a step takes, measured."""

    def peak(self, step: Callable[[], object], trainer: MixedPrecisionTrainer) -> int | None:
        """The most bytes in tensors during it, those of the trainer included; None where nothing counts them."""
        model = trainer.model
        resident = [*model.parameters(), *model.buffers(), *optimizer_tensors(trainer.optimizer)]
        return peak_during(step, trainer.device, resident=resident)

    def seconds(self, step: Callable[[], object], trainer: MixedPrecisionTrainer) -> float:
        """The time of one."""
        return time_call(step, trainer.device, budget_s=0.0, min_runs=TIMED, warmup=0).low_ms / 1e3


def fit_memory(trainer: MixedPrecisionTrainer, batch: Any, *, gauge: Gauge | None = None) -> MemoryReport:
    """Take what makes a step with this batch fit into `trainer.config.memory`, and record it.

    Called between steps. Trials leave nothing behind; afterwards the trainer's options, its optimizer, the storage of
    its weights and what computes its steps are those of the trial that went through. Of a batch that `find_batch_size`
    has confirmed, the measures that it was confirmed with are tried too, whatever weighing says of them.

    Raises:
        ConfigError: all measures together do not suffice; the trainer is as it was.
    """
    asked = trainer.config.memory
    assert asked is not None, "asked for before"
    known = trainer.confirmed if trainer.confirmed is not None and trainer.confirmed.covers(batch) else None
    limit = limit_of(asked, available_memory_bytes(trainer.device))
    if known is not None and known.limit_bytes is not None:
        limit = known.limit_bytes
    with trials(trainer, "memory") as plan:
        made = _Trials(trainer, plan, gauge or Gauge(), batch, known)
        report, settings = _decide(made, batch, limit)
    if settings != Settings():
        put_in_force(trainer, plan, settings)
        trainer.stepper.compute = made.tried(settings)
        trainer.stepper.counts = settings.counted
    _record(trainer, report)
    return report


def _decide(made: _Trials, batch: Any, limit: int) -> tuple[MemoryReport, Settings]:
    base, size = made.trial((), batch, timed=True), calls.batch_size(calls.parse_batch(batch))
    if base.fits(limit):
        return _report(limit, base, base, samples=size), Settings()
    before = base
    if made.compiled:  # the steps that are counted run uncompiled, and hold what eager code holds
        made.counted, made.uncounted = False, "counted steps run uncompiled"
        base = made.trial((), batch, timed=True)
    if base.fits(limit):
        return _report(limit, before, base, samples=size, lines=made.uncounted_line()), Settings(counted=False)
    log.info("a step does not fit into %s: what saves memory is tried", in_gib(limit))
    sample, part = made.largest_part(batch, base)
    order, part = made.weighed(sample, part, scale=size / calls.batch_size(calls.parse_batch(sample)))
    chosen = choose(
        order,
        partial(made.if_possible, batch),
        limit_bytes=limit,
        base_bytes=made.least_bytes(sample, part),
        known=made.as_known(size),
    )
    if not chosen.fits:
        order, chosen = made.as_confirmed(order, chosen, limit)
    if not chosen.fits:
        _refuse(made, base, chosen, order, limit)
    after = made.trial(chosen.taken, sample, timed=True)
    report = _report(
        limit,
        before,
        chosen.trial,
        samples=size,
        timed_samples=calls.batch_size(calls.parse_batch(sample)),
        slowdown=after.seconds / part.seconds if after.seconds and part.seconds else None,
        lines=(*made.uncounted_line(), *lines_of(order, chosen, made.refused)),
    )
    return report, settings_of((measure.name for measure in chosen.taken), counted=made.counted)


def _report(limit: int, before: Trial, after: Trial, **more: Any) -> MemoryReport:
    assert after.peak_bytes is not None, "what fits has a peak"
    return MemoryReport(limit_bytes=limit, before_bytes=before.peak_bytes, after_bytes=after.peak_bytes, **more)


def _refuse(made: _Trials, base: Trial, chosen: Chosen, order: Sequence[Weighed], limit: int) -> NoReturn:
    """The error that says how far it is, and what would do."""
    peaks = [peak for peak in (base.peak_bytes, chosen.trial.peak_bytes) if peak is not None]
    names = ", ".join(one.measure.name for one in order) or "nothing that could be taken"
    need = in_gib(min(peaks)) if peaks else "more memory than the device has"
    passed = f"a memory budget of {in_gib(limit)}; a step of this batch needs {need} with all there is ({names})"
    more = f"Pass memory={gib_for(min(peaks)):g} or more, or give" if peaks else "Give"
    change = f"{more} smaller batches (find_batch_size finds the largest)"
    if made.known is not None:
        passed += f". Before, {made.known}: something else holds memory now, or these samples are larger"
    if not made.offloaded:
        change += ", or keep the optimizer's state on the host (optimizer=optim.offload.OffloadedOptimizer)"
    for name, why in made.refused.items():
        log.warning("memory: %s was not taken: %s", name, why)
    raise ConfigError(explain(passed, "a budget that a step can be made to fit", change))


def _record(trainer: MixedPrecisionTrainer, report: MemoryReport) -> None:
    """The outcome and each measure as decisions of the run."""
    base = trainer.plan.base.name

    def decision(reason: Reason, detail: str, **evidence: Any) -> Decision:
        return Decision(layer="", old=base, new=base, reason=reason, detail=detail, evidence=evidence)

    found = [
        decision(
            Reason.MEMORY_FITS,
            report.summary,
            limit_bytes=report.limit_bytes,
            before_bytes=report.before_bytes,
            after_bytes=report.after_bytes,
            slowdown=report.slowdown,
        )
    ]
    for line in report.lines:
        reason = Reason.MEMORY_SAVED if line.taken else Reason.MEMORY_LEFT
        numbers = {"saved_bytes": line.saved_bytes, "extra_seconds": line.extra_seconds}
        found.append(decision(reason, str(line), **numbers))
    trainer.recorder.decided(found)


@contextmanager
def in_force(
    trainer: MixedPrecisionTrainer, plan: PrecisionPlan, settings: Settings, compute: Callable[[], Run]
) -> Iterator[TrialSteps]:
    """Inside, steps are made with these settings; afterwards they are taken back, and the optimizer's state with them.

    Args:
        compute: gives what computes a step, once the settings are in force.
    """
    fresh, undo = not trainer.optimizer.state, put_in_force(trainer, plan, settings)
    try:
        with closing(TrialSteps(trainer, plan, compute(), counted=settings.counted)) as steps:
            yield steps
    finally:
        if fresh:
            trainer.optimizer.state.clear()
        release_memory(trainer.device)  # weights that get memory now would get pieces of what steps left, and hold it
        undo()
        if fresh:
            trainer.optimizer.state.clear()
        if trainer.config.compile == "regional":  # blocks are compiled in place
            computation(trainer, plan)


def _key(settings: Settings) -> object:
    return tuple(settings.options.items()), settings.states, settings.storage, settings.counted


class _Trials:
    """Steps of one trainer with sets of measures, each tried and taken back."""

    def __init__(
        self,
        trainer: MixedPrecisionTrainer,
        plan: PrecisionPlan,
        gauge: Gauge,
        batch: Any,
        known: ConfirmedBatch | None,
    ) -> None:
        self._trainer, self._plan, self._gauge = trainer, plan, gauge
        self._batch, self.known = batch, known
        self._compiled: dict[object, Run] = {}
        self._heard: list[Any] = []
        self._ran: dict[object, tuple[Run, list[Any]]] = {}
        """What computed the steps of the whole batch, by settings, and what was decided in them."""
        self.compiled = bool(trainer.config.compile)
        self.offloaded = isinstance(trainer.optimizer, OffloadedOptimizer)
        self.counted, self.uncounted = True, ""
        """Whether steps are counted, and if not, why."""
        self.measures, self.refused = possible(trainer, plan)

    def trial(
        self, measures: Sequence[Measure], batch: Any, *, timed: bool = False, counted: bool | None = None
    ) -> Trial:
        """Steps with these measures: the highest peak of the first and a later one, and the time.

        Where a counted step ends in an error that PyTorch's backward has lost, it is tried without being counted, and
        if that goes through no step is counted from then on.
        """
        counted, begun = self.counted if counted is None else counted, time.perf_counter()
        try:
            found = self._made(measures, batch, timed=timed, counted=counted)
            _tell(measures, batch, found, time.perf_counter() - begun)
            return found
        except SystemError as error:
            if not counted or not measures:
                raise
            found = self._made(measures, batch, timed=timed, counted=False)
            log.warning("memory: steps are not counted, as one that was with %s failed: %s", _names(measures), error)
            self.counted, self.uncounted = False, "a step that is counted fails with what is taken"
            return found

    def _made(self, measures: Sequence[Measure], batch: Any, *, timed: bool, counted: bool) -> Trial:
        release_memory(self._trainer.device)  # what is left of other trials cuts it into pieces
        settings = settings_of((measure.name for measure in measures), counted=counted)
        compute = partial(self.computation, settings)
        with unrecorded(self._trainer) as self._heard, in_force(self._trainer, self._plan, settings, compute) as steps:
            peaks: list[int] = []
            if batch is self._batch:
                self._ran[_key(settings)] = steps.compute, self._heard

            def step() -> bool:
                return goes_through(lambda: peaks.append(self._peak(lambda: steps.step(batch))), self._trainer.device)

            if not (steps.warm_up(step) and step()):
                return Trial(peak_bytes=None)
            seconds = self._gauge.seconds(lambda: steps.step(batch), self._trainer) if timed else None
            return Trial(peak_bytes=max(peaks), seconds=seconds)

    def uncounted_line(self) -> tuple[MemoryLine, ...]:
        """What the report says where steps are not counted."""
        return (MemoryLine(name=UNCOUNTED, taken=True, why=self.uncounted),) if self.uncounted else ()

    def if_possible(self, batch: Any, measures: Sequence[Measure]) -> Trial:
        """The trial with these measures, whose step does not fit if it cannot be made at all: each was possible."""
        try:
            return self.trial(measures, batch)
        except FAILURES as error:
            what, kind = _names(measures), type(error).__name__
            log.warning("memory: no step can be made with %s together: %s: %s", what, kind, error)
            return Trial(peak_bytes=None)

    def _peak(self, step: Callable[[], object]) -> int:
        peak = self._gauge.peak(step, self._trainer)
        if peak is None:
            passed = f"memory={self._trainer.config.memory!r} on {self._trainer.device}, which does not count memory"
            raise ConfigError(explain(passed, "a device that does", "Leave memory out"))
        return peak

    def tried(self, settings: Settings) -> Run:
        """What computed the trial of the whole batch with these settings, which are in force, and decided by it how.

        A second look would be one that no trial has seen. Its decisions become the run's. Compiled code is made anew.
        """
        if self._trainer.config.compile or _key(settings) not in self._ran:
            return self.computation(settings)
        compute, heard = self._ran[_key(settings)]
        self._trainer.recorder.decided(heard)
        return compute

    def least_bytes(self, sample: Any, part: Trial) -> int | None:
        """What a step of the whole batch holds as it is, at least; None where the part that was weighed tells nothing.

        Each point of a step holds what is there anyway and so much for each sample, and the peak is the highest point:
        the line through the peaks of two parts lies below it, for larger batches.
        """
        if sample is self._batch or part.peak_bytes is None:
            return part.peak_bytes
        size, whole = (calls.batch_size(calls.parse_batch(batch)) for batch in (sample, self._batch))
        if size < 2:
            return None
        try:
            half = self.trial((), first_samples(sample, size // 2))
        except FAILURES as error:  # few samples may be too few for the model
            log.info("no step can be made with %d samples: %s", size // 2, error)
            return None
        if half.peak_bytes is None:
            return None
        of_a_sample = max(0, part.peak_bytes - half.peak_bytes) / (size - size // 2)
        return part.peak_bytes + round((whole - size) * of_a_sample)

    def as_known(self, size: int) -> Known | None:
        """What `find_batch_size` confirmed, for a batch of this size."""
        if self.known is None or self.known.peak_bytes is None:
            return None
        peak = round(self.known.peak_bytes * size / self.known.samples)
        return Known(measures=frozenset(self.known.measures), peak_bytes=peak)

    def as_confirmed(self, order: Sequence[Weighed], chosen: Chosen, limit: int) -> tuple[tuple[Weighed, ...], Chosen]:
        """The batch with all that `find_batch_size` confirmed it with, if that goes through; else as it was chosen."""
        wanted = [] if self.known is None else [m for m in self.measures if m.name in self.known.measures]
        measured = chosen.trial.peak_bytes is not None  # what ran out of memory may go through another time
        if not wanted or (measured and set(wanted) == set(chosen.taken)):
            return tuple(order), chosen
        trial = self.trial(wanted, self._batch)
        if not trial.fits(limit):
            return tuple(order), chosen
        for measure in wanted:
            self.refused.pop(measure.name, None)
        missing = [m for m in wanted if all(one.measure != m for one in order)]
        found = Chosen(taken=tuple(wanted), trial=trial, fits=True)
        return (*order, *(Weighed(measure=measure) for measure in missing)), found

    def computation(self, settings: Settings) -> Run:
        """What computes a step with these options, which are in force. A whole compiled model is compiled once."""
        if self._trainer.config.compile is not True:
            return computation(self._trainer, self._plan)
        key = tuple(settings.options.items())
        if key not in self._compiled:
            first = not key and self._trainer.has_stepper
            self._compiled[key] = self._trainer.stepper.compute if first else computation(self._trainer, self._plan)
        return self._compiled[key]

    def largest_part(self, batch: Any, base: Trial) -> tuple[Any, Trial]:
        """As much of the batch, by halves, as a step goes through with as it is; and that step."""
        size, sample = calls.batch_size(calls.parse_batch(batch)), batch
        while base.peak_bytes is None and size > 1:
            size //= 2
            sample = first_samples(batch, size)
            try:
                base = self.trial((), sample, timed=True)
            except (RuntimeError, ValueError) as error:  # few samples may be too few for the model
                log.info("no step can be made with %d samples: %s", size, error)
                break
        return (batch if base.peak_bytes is None else sample), base

    def weighed(self, sample: Any, base: Trial, *, scale: float) -> tuple[tuple[Weighed, ...], Trial]:
        """The measures that can be taken, in order, and what a step takes as it is.

        Where no step goes through as it is, the order is that of `possible`.
        """
        alone: dict[Measure, Trial] = {}
        unknown: list[Weighed] = []
        if base.peak_bytes is None:
            return tuple(Weighed(measure=measure) for measure in self.measures), base
        for measure in self.measures:
            way = [*self._before(measure), measure]
            try:
                alone[measure] = self.trial(way, sample, timed=True)
            except FAILURES as error:  # a step as it is went through
                self.refused[measure.name] = f"{type(error).__name__}: {error}"
                continue
            said = [d.detail for d in self._heard if d.reason == Reason.LOSS_NOT_FUSED]
            if said and measure.name.startswith("fused_loss"):
                del alone[measure]
                if sample is not self._batch and said[0].startswith(SMALL):
                    unknown.append(Weighed(measure=measure))  # of the whole batch it may be large enough
                else:
                    self.refused[measure.name] = said[0]
        again = self.trial((), sample, timed=True)  # the first steps of a process are slow ones
        base = replace(base, seconds=min(filter(None, (base.seconds, again.seconds)), default=None))
        return (*weigh(base, alone, scale=scale), *unknown), base

    def _before(self, measure: Measure) -> list[Measure]:
        """Those that it builds on."""
        return [m for one in self.measures if one.name == measure.after for m in (*self._before(one), one)]


def _tell(measures: Sequence[Measure], batch: Any, found: Trial, seconds: float) -> None:
    what = f"{calls.batch_size(calls.parse_batch(batch))} samples with {_names(measures) or 'nothing'}"
    peak = "do not fit" if found.peak_bytes is None else in_gib(found.peak_bytes)
    step = "" if found.seconds is None else f", {1e3 * found.seconds:.1f} ms a step"
    progress.info("memory: %s: %s%s; took %.1f s", what, peak, step, seconds)


def _names(measures: Sequence[Measure]) -> str:
    return ", ".join(measure.name for measure in measures)
