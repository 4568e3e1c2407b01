"""`PrecisionMonitor`: what a model computes in which format, and what its tensors are like, on sampled steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import TracebackType

import torch
from torch import nn
from torch.optim import Optimizer

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.monitor import internals
from deepseek_mp.monitor.alarms import Alarm, Limits
from deepseek_mp.monitor.layer_statistics import LayerStatistics
from deepseek_mp.monitor.sampling import Sampling
from deepseek_mp.monitor.statistics import Statistics
from deepseek_mp.monitor.tally import Steps, Tally
from deepseek_mp.monitor.usage import Usage, render
from deepseek_mp.monitor.watch import Watch
from deepseek_mp.monitor.window import Window

log = logging.getLogger("deepseek_mp.monitor")

_SAMPLING, _LIMITS = Sampling(), Limits()


class PrecisionMonitor:
    """Counts which operations ran in which format, and measures the tensors of each layer, on sampled steps.

        monitor = PrecisionMonitor(model, optimizer)
        for epoch in range(10):
            ...                                      # any loop; the model is called as usual
            usage = monitor.log_precision_usage()    # logs the tables, returns them, counts from zero again

    **Operations** are counted on the first step after each report and then on every `sample_every`-th, completely, as
    PyTorch dispatches them; the others cost one call of a hook. On a counted step compiled parts of the model run
    uncompiled. A step is one call of the model and what follows it, up to the optimizer's step, the next call or the
    report. Calls with gradients off are sampled apart, and end with the call.

    **Statistics** have a rate of their own, `Sampling.every`: on such a step a few layers, which take turns, are
    measured, and `statistics()` gives what is known of all. Nothing waits for the device. They are of calls with
    gradients on. In a model with compiled parts they are taken on counted steps only, which run uncompiled.

    Args:
        model: if it is to be compiled by `model.compile()`, do that first; of `torch.compile(model)` pass the result.
        optimizer: whose updates to measure; None measures none.
        sample_every: steps between two whose operations are counted; None counts nothing outside `sample()`, for loops
            that choose the steps themselves.
        sampling: how statistics are sampled; None takes none.
        limits: beyond which numbers there is an alarm.

    `close()`, or leaving the monitor used as a context manager, removes every hook. `ConfigError` if an argument has a
    wrong value.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        sample_every: int | None = 100,
        sampling: Sampling | None = _SAMPLING,
        limits: Limits = _LIMITS,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ConfigError(explain(f"model is a {type(model).__name__}", "a torch.nn.Module", "Pass the model"))
        whole = isinstance(sample_every, int) and not isinstance(sample_every, bool)
        if sample_every is not None and not (whole and sample_every >= 1):
            raise ConfigError(
                explain(
                    f"sample_every={sample_every!r}",
                    "a whole number of steps, at least 1, or None to sample inside sample() only",
                    "Use 1 to count every step",
                )
            )
        for name, value, kinds in (
            ("optimizer", optimizer, Optimizer | None),
            ("sampling", sampling, Sampling | None),
            ("limits", limits, Limits),
        ):
            if not isinstance(value, kinds):
                shown = getattr(kinds, "__name__", str(kinds))
                raise ConfigError(explain(f"{name} is a {type(value).__name__}", shown, f"Change {name}"))
        self._model = model
        self._every = sample_every
        self._tally = Tally()
        self._windows: list[Window] = []
        """The open window, if any, is the last; those before it still have something to sweep."""
        self._closed = False
        self._paused = False
        self._reported = 0
        """Alarms that were in a report."""
        self._statistics = None if sampling is None else Statistics(model, optimizer, sampling, limits)
        self._watch = Watch(model, self._called)
        self._watch.attach()

    @property
    def has_sample(self) -> bool:
        """Whether a training step was counted since the last report."""
        return self._tally.train.sampled > 0 or any(window.is_open for window in self._windows)

    def log_precision_usage(self) -> Usage:
        """Log the table of what ran since the last call, at level INFO, and return it.

        Statistics are those of `statistics()`, and wait for the device as it does.
        """
        self._end_window()
        compiled_since = not self._closed and self._watch.attach()
        tally, self._tally = self._tally, Tally()
        for window in self._windows:
            window.recorder.tally = self._tally
        _say_what_is_missing(tally, compiled_since=compiled_since)
        statistics = self.statistics()
        usage = replace(tally.usage(), statistics=statistics, alarms=self.alarms_since(self._reported))
        self._reported = self.alarms_raised
        log.info("%s", render(usage))
        return usage

    @contextmanager
    def sample(self, *, compiled: bool = False) -> Iterator[None]:
        """Count what runs inside the `with` statement: a step's forward, loss and backward.

        `compiled` says that a compiled function of the caller's calls the model, which the model does not show; that
        function runs uncompiled inside, and the report says so.

        `ConfigError` inside another `sample()` or after `close()`.
        """
        held = any(window.is_open and window.is_held for window in self._windows)
        if held or self._closed:
            raise ConfigError(
                explain(
                    "sample() inside sample()" if held else "sample() after close()",
                    "one sample() at a time, on an open monitor",
                    "Wrap the forward, loss and backward of a step once",
                )
            )
        self._end_window()
        if internals.only_traced():
            yield
            return
        window = Window(self._model, self._tally)
        self._windows.append(window)
        if compiled and self._statistics is not None:
            self._statistics.is_compiled = True
        self._tally.compiled_counted_eagerly |= compiled
        try:
            with window.held():
                yield
        finally:
            self._end_window()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Calls of the model inside the `with` statement are no steps: trials, or a step run again."""
        before, self._paused = self._paused, True
        if self._statistics is not None:
            self._statistics.leave_modules()
        try:
            yield
        finally:
            self._paused = before

    def statistics(self, *, wait: bool = True) -> dict[str, LayerStatistics]:
        """Statistics by layer, of the layers with a weight of two dimensions or more; empty without sampling.

        Waits for the device, to report all that was sampled. Without `wait` it reports what has arrived on the host by
        now: the sampled steps but for the last one or two.
        """
        return {} if self._statistics is None else self._statistics.layers(wait=wait)

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """The alarms that were raised, the last 256 of them. Each kind is also logged once for a layer."""
        return () if self._statistics is None else tuple(self._statistics.log.alarms)

    @property
    def alarms_raised(self) -> int:
        """How many alarms there were, those that are forgotten included."""
        return 0 if self._statistics is None else self._statistics.log.raised

    def alarms_since(self, raised: int) -> tuple[Alarm, ...]:
        """The alarms after the first `raised` ones, as far as they are remembered."""
        return () if self._statistics is None else self._statistics.log.since(raised)

    def close(self) -> None:
        """Remove every hook. What was counted can still be reported; nothing more will be."""
        self._closed = True
        self._end_window()
        self._watch.detach()
        if self._statistics is not None:
            self._statistics.close()

    def _called(self, entered: bool) -> None:
        """The model is called; `entered` if its entry hooks have run already."""
        if self._paused or internals.backward_task() != internals.NO_TASK:
            return  # activation checkpointing runs it again
        train = torch.is_grad_enabled()
        if any(window.inside for window in self._windows[-1:]):
            return  # the model calls itself
        steps = self._tally.steps(train=train)
        due = self._every is not None and steps.seen % self._every == 0
        steps.seen += 1
        if due or self._windows:
            self._begin(steps, due=due, train=train, entered=entered)
        if self._statistics is not None:
            opened = next((window for window in self._windows if window.is_open), None)
            self._statistics.called(train=train, window=opened)

    def _begin(self, steps: Steps, *, due: bool, train: bool, entered: bool) -> None:
        window = self._windows[-1] if self._windows else None
        if window is not None and window.takes(train=train):
            steps.sampled += 1
            return
        self._end_window()
        if not due or not internals.OPEN_ENDED:
            return
        if internals.is_temporary():
            self._tally.note("a step inside a compiled or traced function was not sampled: its operations are not seen")
            return
        steps.sampled += 1
        self._windows.append(Window(self._model, self._tally))
        self._windows[-1].open_ended(entered=entered)

    def _end_window(self) -> None:
        for window in self._windows:
            window.close()
        self._windows = [window for window in self._windows if not window.sweep()]

    def __enter__(self) -> PrecisionMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _say_what_is_missing(tally: Tally, *, compiled_since: bool) -> None:
    """Notes for the reader of the report on what this one cannot tell."""
    if tally.train.seen + tally.evaluation.seen == 0:
        tally.note(
            "the model was compiled after the monitor was made; its calls are seen from here on"
            if compiled_since
            else "the model was not called since the last report (give the result of torch.compile to the monitor)"
        )
    if not internals.BACKWARD:
        tally.note("this PyTorch does not tell which layer an operation of the backward belongs to")
    if not internals.OPEN_ENDED:
        tally.note("this PyTorch allows sampling inside `with monitor.sample()` only")
