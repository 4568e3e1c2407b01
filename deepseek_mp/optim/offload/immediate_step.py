"""`ImmediateStep`: the host steps chunks while gradients arrive, without having seen those of the others.

Gradients arrive in the order that is the reverse of the one in which the next forward reads the weights, and faster
than the host steps. So the host takes, of the chunks that are there, always the one that forward reads first. Forward
then begins soon after backward, and waits chunk by chunk for what the host had no time for before, at the end for one
that it reads last; in the order of arrival it would wait for all of the host's work before it had read anything.

Nothing can make the step wait for the last gradient, so nothing can clip, skip or take back: no norm is taken and no
state is copied. A gradient is added up, stepped on, and the weight rounded, block by block in one go, which is the
least that the host's memory has to move.

The host works on a thread of its own, so that `step` returns before it is done: the next forward begins with the
layers that are there, and waits where it reads a chunk that is not. A device takes only so many kernels ahead, so that
backward returns, and `step` is called, when the device is in the middle of it. The host can begin before, at the first
chunk that is complete; then the window's last backward is the step, which cannot be skipped any more.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from threading import Lock
from typing import Any, NoReturn

from torch.optim import Optimizer

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.optim.offload import rule
from deepseek_mp.optim.offload.host_chunk import HostChunk, Taken
from deepseek_mp.optim.offload.in_turn import UnderWay
from deepseek_mp.optim.offload.lanes import Lanes
from deepseek_mp.optim.offload.sync_step import Parts, SyncStep
from deepseek_mp.optim.offload.verdict import AS_IT_IS, Scaling
from deepseek_mp.optim.offload.worker import finish


@dataclass(eq=False, kw_only=True)
class _Window:
    """One step on its way."""

    options: list[dict[str, Any]]
    """Of all groups."""
    given: set[HostChunk] = field(default_factory=set)
    """To the host's thread."""
    tasks: list[Future[Any]] = field(default_factory=list)
    """What it was asked to do, in its order: for each chunk to begin one, which need not be that one."""
    ended: int = 0
    """So many of them are known to have ended well."""
    waiting: dict[HostChunk, Taken] = field(default_factory=dict)
    """Not begun."""
    under_way: dict[HostChunk, UnderWay] = field(default_factory=dict)
    sent: set[HostChunk] = field(default_factory=set)
    """On their way up, or there."""
    looking: Lock = field(default_factory=Lock)
    """At `waiting`."""
    placing: Lock = field(default_factory=Lock)
    readers: tuple[Any] | None = None
    """The mark of what still reads the weights that are replaced, which itself may be None. None until `step`."""
    unsent: list[HostChunk] = field(default_factory=list)
    """Stepped before that was known."""
    error: BaseException | None = None
    """Why the rest is not done, also when another state has been loaded by then."""

    def arrived(self, lanes: Lanes) -> HostChunk | None:
        """Of the chunks whose gradients are there, the one that forward reads first."""
        with self.looking:
            waiting = sorted(self.waiting.items(), key=lambda item: -item[0].number)
        there = (chunk for chunk, taken in waiting if all(map(lanes.has_landed, taken.coming.values())))
        return next(there, None)

    def next_to_arrive(self) -> HostChunk:
        with self.looking:
            return min(self.waiting, key=lambda chunk: chunk.number)

    def cancel(self) -> None:
        """Nobody is at work on it any more."""
        for work in self.under_way.values():
            work.cancel()
        self.under_way.clear()


@dataclass(eq=False)
class _Sending:
    """The weights of a chunk on their way to be sent, as far as `ForwardWaits` asks a future."""

    window: _Window
    chunk: HostChunk

    def exception(self) -> BaseException | None:
        """Wait until they are sent; what has failed before."""
        while True:
            number = self.window.ended  # first: when all have ended it is sent, whichever thread has waited for them
            if self.chunk in self.window.sent:
                return None
            error = self.window.tasks[number].exception()  # an interrupt leaves it to be waited for
            if error is not None:
                return error
            self.window.ended = max(self.window.ended, number + 1)


class ImmediateStep(SyncStep):
    """The mode 'immediate'. Weights go up while backward runs, and take their places when it has ended.

    Args:
        parts: what it works with.
        in_backward: whether the host begins in the window's last backward, and not in `step`.
    """

    waits_for_all = False

    def __init__(self, parts: Parts, *, in_backward: bool) -> None:
        super().__init__(parts)
        self._worker, self._in_backward = parts.worker(), in_backward
        self._begun: _Window | None = None
        """The step that `step` has not handed over to the next forward: begun in backward, or one that has failed."""

    @property
    def has_begun(self) -> bool:
        return self._begun is not None

    def reopened(self, chunk: HostChunk) -> None:
        self._give_up_broken()
        if self._begun is not None and chunk in self._begun.given:
            self._refuse("a gradient of parameters that this window's backward has stepped")
        super().reopened(chunk)
        self.parts.waits.until_sent([chunk.number])

    def complete(self, chunk: HostChunk, *, last: bool) -> None:
        if not (last and self._in_backward) or self.broken is not None:
            super().complete(chunk, last=last)
            return
        for slot in chunk.slots:
            slot.adopt()
        if self._begun is None:
            self._begun = _Window(options=rule.options(self.parts.owner().param_groups))
        try:
            self._give(self._begun, chunk, AS_IT_IS)
        except BaseException as error:  # interrupted: its gradients are nowhere then
            self.broken = self.broken or error
            raise

    def gather(self, *, is_scaled: bool) -> None:
        """Wait for the last step, and the threads that add up gradients of earlier micro-batches; for no others."""
        self._give_up_broken()
        if self._begun is not None and is_scaled:
            self._refuse("a loss scaler's step on gradients that backward has stepped on as they were")
        given = set() if self._begun is None else self._begun.given
        for chunk in self.parts.chunks:
            if chunk not in given:
                self.reopened(chunk)

    def land(self) -> None:
        self._look()
        super().land()

    def settle(self) -> None:
        self._look()
        self.parts.waits.until_sent(chunk.number for chunk in self.parts.chunks)

    def forget(self) -> None:
        self._give_up_broken()
        if self._begun is not None:
            self._refuse("a window that is not wanted, whose backward has stepped")
        super().forget()

    def apply(self, scaling: Scaling) -> None:
        """Step the chunks that are not begun, as their gradients arrive, and what is on the device."""
        options = rule.options(self.parts.owner().param_groups)
        if self._begun is not None and options != self._begun.options:
            self._refuse("options that the backward that steps has not seen")
        self.prepare()
        window = self._begun or _Window(options=options)  # an interrupt leaves one that is new to nobody
        readers = (self.parts.lanes.now(),)
        try:
            self.step_device_part(scaling)  # behind backward, so that the host's work hides it
            self._place(window, readers)
            for chunk in self.parts.chunks:
                if chunk.has_gradients or chunk.is_pending:
                    self._give(window, chunk, scaling)
            self._submit(window, self._finish_all)
            for chunk in window.given:
                self.parts.waits.expect(chunk.number, _Sending(window, chunk))
            if not (self.parts.waits.attached and self.parts.is_beside):
                self.parts.waits.wait_all()
            self._begun = None
        except BaseException as error:
            self.broken, self._begun = self.broken or error, window
            self._drop(window)
            raise

    def prepare(self) -> None:
        """As before other steps. What backward has stepped has taken over there what others had written."""
        given = () if self._begun is None else self._begun.given
        if any(slot.written for chunk in given for slot in chunk.slots):
            self._refuse("weights that were written behind the backward that steps, before `step`")
        if any(chunk.has_gradients for chunk in given):
            self._refuse("gradients that were put behind the backward that steps, before `step`")
        super().prepare()

    def _look(self) -> None:
        """`ConfigError` if what the optimizer has is between two states."""
        self._give_up_broken()
        if self._begun is not None:
            passed = "gradients, weights or states that are looked at behind the backward that steps, before `step`"
            self._refuse(passed, breaks=False)

    def _give_up_broken(self) -> None:
        """A step that is not handed over ends with a failure."""
        if self._begun is not None and self.broken is not None:
            self._drop(self._begun)

    def _refuse(self, passed: str, *, breaks: bool = True) -> NoReturn:
        """Raise `ConfigError`; where the window's step cannot be ended any more, the state is no whole one."""
        allowed = "`step` right behind the window's last backward, which is its step (begin='backward')"
        change = "Do that, with accumulation= as many backward passes as a window has, or take begin='step'"
        error = ConfigError(explain(passed, allowed, change))
        if breaks and self._begun is not None:
            self.broken = self.broken or error
            self._drop(self._begun)
        raise error

    def _drop(self, window: _Window) -> None:
        """A step that has failed is not ended. Nobody is at work on it then; who is interrupted here, comes back."""
        window.error = window.error or self.broken
        finish(self._worker)
        window.cancel()
        self.parts.waits.expect_nothing()
        self.parts.waits.wait_all()  # what was sent arrives before the weights that are loaded next
        self._begun = None

    # ------------------------------------------------------------------- what the host's thread does

    def _give(self, window: _Window, chunk: HostChunk, scaling: Scaling) -> None:
        """Let it begin one more chunk of those that it has, as soon as one is there."""
        taken = chunk.take(self.parts.lanes)
        with window.looking:
            window.waiting[chunk] = taken
        window.given.add(chunk)
        self._submit(window, partial(self._begin_one, scaling=scaling))

    def _submit(self, window: _Window, task: Callable[..., None]) -> None:
        window.tasks.append(self._worker.submit(self._guarded, task, window, self.parts.owner()))

    def _guarded(self, task: Callable[..., None], window: _Window, owner: Optimizer) -> None:
        """The optimizer is held until then: who lets it go finds nobody at work."""
        window.error = window.error or self.broken
        if window.error is not None:
            raise window.error
        try:
            task(window, owner)
        except BaseException as error:
            self.broken = window.error = error
            window.cancel()
            raise

    def _begin_one(self, window: _Window, owner: Optimizer, *, scaling: Scaling) -> None:
        """Begin a chunk, and finish the one before: then the crew need not wait in between."""
        lanes = self.parts.lanes
        chunk = window.arrived(lanes)
        if chunk is None:
            self._finish_all(window, owner)  # there is time for it, in which others may arrive
            chunk = window.arrived(lanes) or window.next_to_arrive()
        before = list(window.under_way)
        with window.looking:
            taken = window.waiting.pop(chunk)
        chunk.freed(lanes)
        window.under_way[chunk] = chunk.begin_taken(window.options, owner.state, taken, scaling, lanes)
        # A crew of one thread does all its work in the beginning.
        for done in before if self.parts.crew.threads > 1 else [chunk]:
            self._finish(window, done)

    def _finish_all(self, window: _Window, _owner: Optimizer) -> None:
        for chunk in list(window.under_way):
            self._finish(window, chunk)

    def _finish(self, window: _Window, chunk: HostChunk) -> None:
        window.under_way[chunk].end()
        del window.under_way[chunk]
        chunk.kept = False
        with window.placing:
            if window.readers is None:
                window.unsent.append(chunk)
            else:
                self._send(window, chunk)

    def _place(self, window: _Window, readers: tuple[Any]) -> None:
        """New weights may take their places, behind these."""
        with window.placing:
            window.readers = readers
            for chunk in window.unsent:
                self._send(window, chunk)
            window.unsent = []

    def _send(self, window: _Window, chunk: HostChunk) -> None:
        assert window.readers is not None, "known by then"
        chunk.send(self.parts.lanes, readers=window.readers[0])
        self.parts.waits.sent(chunk.number, chunk.uploads)
        window.sent.add(chunk)
