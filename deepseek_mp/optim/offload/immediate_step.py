"""`ImmediateStep`: the host steps each chunk as its gradients arrive, without having seen those of the others.

Nothing can make the step wait for the last gradient, so nothing can clip, skip or take back: no norm is taken and no
state is copied. A gradient is added up, stepped on, and the weight rounded, block by block in one go, which is the
least that the host's memory has to move.

The host works on a thread of its own, so that `step` returns before it is done: the next forward begins with the layers
that are there, and waits where it reads a chunk that is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from deepseek_mp.optim.offload import rule
from deepseek_mp.optim.offload.host_chunk import HostChunk, Taken
from deepseek_mp.optim.offload.in_turn import UnderWay, in_turn
from deepseek_mp.optim.offload.sync_step import Parts, SyncStep
from deepseek_mp.optim.offload.verdict import Scaling


class ImmediateStep(SyncStep):
    """The mode 'immediate'. Weights go up while backward runs, and take their places when it has ended."""

    waits_for_all = False

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._worker = parts.worker()

    def reopened(self, chunk: HostChunk) -> None:
        super().reopened(chunk)
        self.parts.waits.until_sent([chunk.number])

    def gather(self) -> None:
        """Wait for the last step, and the threads that add up gradients of earlier micro-batches; for no others."""
        for chunk in self.parts.chunks:
            self.reopened(chunk)

    def settle(self) -> None:
        self.parts.waits.until_sent(chunk.number for chunk in self.parts.chunks)

    def apply(self, scaling: Scaling) -> None:
        """Begin to step all chunks, in the order in which their gradients arrive, beside what the device does."""
        self.prepare()
        try:
            self._begin(scaling)
        except BaseException as error:
            self.broken = error
            raise
        if not (self.parts.waits.attached and self.parts.is_beside):
            self.parts.waits.wait_all()

    def _begin(self, scaling: Scaling) -> None:
        lanes, owner = self.parts.lanes, self.parts.owner()
        groups = rule.options(owner.param_groups)
        readers = lanes.now()
        self.step_device_part(scaling)  # behind backward, so that the host's work hides it
        chunks = [chunk for chunk in self.parts.chunks if chunk.has_gradients or chunk.is_pending]
        taken = {chunk: chunk.take(lanes) for chunk in chunks}

        def begin(chunk: HostChunk) -> UnderWay:
            chunk.freed(lanes)
            return chunk.begin_taken(groups, owner.state, taken[chunk], scaling, lanes)

        def send(chunk: HostChunk) -> None:
            chunk.send(lanes, readers=readers)
            chunk.kept = False
            self.parts.waits.sent(chunk.number, chunk.uploads)

        stepped = in_turn(chunks, begin, send, self.parts.crew)
        for chunk in chunks:
            self.parts.waits.expect(chunk.number, self._worker.submit(self._next, stepped, owner))

    def _next(self, stepped: Iterator[None], _owner: Optimizer) -> None:
        """Finish the next chunk. The optimizer is held until then: who lets it go waits for nobody's work."""
        if self.broken is not None:
            raise self.broken
        try:
            next(stepped)
        except BaseException as error:
            self.broken = error
            raise
