"""`SpeculativeStep`: the host steps a chunk as soon as its gradients have landed, and does it again if that was wrong.

Whether a step is applied, and by what its gradients are multiplied, is known only when all of them have been seen. The
guess is that it is applied, with the loss scale of the step before and without clipping. Where the guess was right, the
host's step has run beside backward. Where it was wrong the chunk is put back and stepped again, so that the numbers
are those of the mode 'sync' in any case.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.optim.offload import rule
from deepseek_mp.optim.offload.grad_norm import sample
from deepseek_mp.optim.offload.host_chunk import HostChunk
from deepseek_mp.optim.offload.in_turn import UnderWay
from deepseek_mp.optim.offload.pieces import Slot
from deepseek_mp.optim.offload.sync_step import Parts, SyncStep
from deepseek_mp.optim.offload.verdict import AS_IT_IS, Scaling, Verdict


@dataclass(eq=False, kw_only=True)
class Guess:
    """What a chunk was stepped with."""

    scaling: Scaling
    options: list[dict[str, Any]]
    """Of all groups."""
    landed: Future[Any] = field(default_factory=Future)
    stepped: Future[Any] = field(default_factory=Future)
    versions: dict[Slot, int] = field(default_factory=dict)
    """Of the accumulated gradients."""
    samples: dict[Slot, Tensor] = field(default_factory=dict)
    """Some values of each accumulated gradient, as it landed."""
    is_withdrawn: bool = False
    """Whether somebody has begun to put back what was made on it."""


class SpeculativeStep(SyncStep):
    """The mode 'speculative'. Between backward and `step` masters and states may be ahead; `settle` puts them back."""

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._worker = parts.worker()
        self._guesses: dict[int, Guess] = {}
        self._scaling = AS_IT_IS
        self._were_written = False
        self._put_back = 0
        """Chunks of this window that were stepped too early."""

    def reopened(self, chunk: HostChunk) -> None:
        super().reopened(chunk)
        if chunk.number in self._guesses:
            self._withdraw(chunk)
            self._put_back += 1

    def complete(self, chunk: HostChunk, *, last: bool) -> None:
        if not last or self.broken is not None:
            super().complete(chunk, last=last)
            return
        for slot in chunk.slots:
            slot.adopt()
        guess = Guess(scaling=self._scaling, options=rule.options(self.parts.owner().param_groups))
        guess.landed = self._worker.submit(self._take, chunk, guess)
        guess.stepped = self._worker.submit(self._speculate, chunk, guess)
        self._guesses[chunk.number] = guess  # not before it is sure that somebody works on it

    def land(self) -> None:
        for chunk in self.parts.chunks:
            guess = self._guesses.get(chunk.number)
            if guess is None:
                self.land_chunk(chunk)
                continue
            error = guess.landed.exception()
            if error is not None:
                self._withdraw(chunk)  # else the next try would find the same
                raise error

    def forget(self) -> None:
        for chunk in self.parts.chunks:
            self._landed(chunk)  # what failed in a window that is not wanted is no error
        self.settle()
        self._put_back = 0
        super().forget()

    def settle(self) -> None:
        for chunk in self.parts.chunks:
            super().reopened(chunk)
            if chunk.number in self._guesses:
                self._withdraw(chunk)

    def step(self, verdict: Verdict) -> None:
        self.check_whole()
        self._scaling, self.redone, self._put_back = verdict.unscaling, self._put_back, 0
        if verdict.reason is not None:
            self.settle()
            return
        # Who scales one gradient scales all, so that one which shows it is enough.
        self._were_written = any(_differs(guess) for guess in self._guesses.values())
        try:
            super().step(verdict)
        except BaseException:
            self.settle()
            raise

    def prepare(self) -> None:
        for chunk in self.parts.chunks:
            if not chunk.has_gradients or any(slot.written for slot in chunk.slots):
                self.reopened(chunk)
        self.redone, self._put_back = self.redone + self._put_back, 0
        super().prepare()

    def begin_chunk(self, chunk: HostChunk, scaling: Scaling, groups: Sequence[Mapping[str, Any]]) -> UnderWay | None:
        guess = self._guesses.get(chunk.number)
        if guess is not None:
            guess.stepped.result()
            del self._guesses[chunk.number]
            if self._holds(chunk, guess, scaling, groups):
                return None
            self.redone += 1
            chunk.restore(self.parts.owner().state)
        return super().begin_chunk(chunk, scaling, groups)

    def _take(self, chunk: HostChunk, guess: Guess) -> None:
        chunk.land(self.parts.lanes, measure=self.parts.measure)
        guess.samples = {slot: sample(gradient) for slot, gradient in chunk.gradients().items()}

    def _speculate(self, chunk: HostChunk, guess: Guess) -> None:
        guess.landed.result()
        guess.versions = _versions(chunk)
        stepping = super().begin_chunk(chunk, guess.scaling, guess.options)
        if stepping is not None:
            stepping.end()

    def _holds(self, chunk: HostChunk, guess: Guess, scaling: Scaling, options: Sequence[Mapping[str, Any]]) -> bool:
        """Whether the chunk was stepped with what it should have been stepped with."""
        if self._were_written or guess.is_withdrawn or guess.versions != _versions(chunk):
            return False
        return scaling == guess.scaling and list(options) == guess.options

    def _withdraw(self, chunk: HostChunk) -> None:
        """Wait for a chunk and put it back, whether or not its step failed."""
        guess = self._guesses[chunk.number]
        guess.landed.exception()
        guess.stepped.exception()
        guess.is_withdrawn = True
        if chunk.kept:
            chunk.restore(self.parts.owner().state)
        del self._guesses[chunk.number]


def _versions(chunk: HostChunk) -> dict[Slot, int]:
    """How often each accumulated gradient has been written, and -1 where it is not where we put it."""
    return {
        slot: slot.total._version if slot.master.grad is slot.total else -1
        for slot in chunk.slots
        if slot.master.grad is not None
    }


def _differs(guess: Guess) -> bool:
    """Whether gradients have other values than they landed with, though nobody may have counted the write."""
    return any(
        slot.master.grad is not None and not torch.equal(landed, sample(slot.master.grad))
        for slot, landed in guess.samples.items()
    )
