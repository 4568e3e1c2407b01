"""`DelayedStep`: the host steps on the last gradients beside the next forward and backward, which see older weights.

Weights change on the device only in `step`, so the numbers do not depend on how fast the host is: gradient t is taken
at weights that gradients up to t - 2 have made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from torch import Tensor

from deepseek_mp.optim.offload import rule
from deepseek_mp.optim.offload.host_chunk import HostChunk
from deepseek_mp.optim.offload.pieces import Slot
from deepseek_mp.optim.offload.sync_step import Parts, SyncStep
from deepseek_mp.optim.offload.verdict import Scaling, Verdict

Handed = Mapping[HostChunk, Mapping[Slot, Tensor]]
"""The gradients of each chunk that are stepped on."""


class DelayedStep(SyncStep):
    """The mode 'delayed'; the first `delay_from` steps are those of 'sync'."""

    def __init__(self, parts: Parts, delay_from: int) -> None:
        super().__init__(parts)
        self._worker = parts.worker()
        self._delay_from = delay_from
        self._outstanding: Future[Any] | None = None

    def settle(self) -> None:
        """Finish the outstanding step and send its weights up: the next forward then sees the latest ones."""
        if self._outstanding is None:
            return
        # Whoever interrupts the waiting finds the step outstanding.
        error = self._outstanding.exception()
        if error is not None:
            error.add_note("This was the host's step on the gradients before these; it was taken back.")
            self.take_back([chunk for chunk in self.parts.chunks if chunk.kept], error)
            self._outstanding = None
            raise error
        for chunk in reversed(self.parts.chunks):
            if chunk.kept:
                for slot in chunk.slots:
                    slot.adopt(base=chunk.base_of(slot))
                self.send(chunk)
        self.commit()
        self._outstanding = None

    def step(self, verdict: Verdict) -> None:
        self.settle()
        super().step(verdict)

    def keep_ahead(self) -> None:
        """Nothing: the next step begins at once, and until it has ended the copies are those of the last one."""

    def apply(self, scaling: Scaling) -> None:
        if self._applied() < self._delay_from:
            super().apply(scaling)
            return
        self.prepare()
        handed = {chunk: chunk.hand_over() for chunk in reversed(self.parts.chunks) if chunk.has_gradients}
        options = rule.options(self.parts.owner().param_groups)
        self._outstanding = self._worker.submit(self._run, handed, options, scaling)

    def _run(self, handed: Handed, options: Sequence[Mapping[str, Any]], scaling: Scaling) -> None:
        states = self.parts.owner().state
        for chunk, gradients in handed.items():
            chunk.freed(self.parts.lanes)
            chunk.step(options, states, gradients, scaling)

    def _applied(self) -> int:
        """Steps that were applied in all runs."""
        states = self.parts.owner().state.values()
        return max((int(state["step"]) for state in states if "step" in state), default=0)
