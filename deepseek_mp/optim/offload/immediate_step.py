"""`ImmediateStep`: the host steps each chunk as its gradients arrive, without having seen those of the others.

Nothing can make the step wait for the last gradient, so nothing can clip, skip or take back: no norm is taken and no
state is copied. A gradient is added up and stepped on block by block in one go, which is the least that the host's
memory has to move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_mp.optim.offload.host_chunk import HostChunk, Stepping
from deepseek_mp.optim.offload.sync_step import Parts, SyncStep
from deepseek_mp.optim.offload.verdict import AS_IT_IS, Scaling

ON_THE_WAY = 8
"""Chunks that are on their way up at once. As many as arrive while the host steps one, or the device its part, so that
the lane is always busy; the fewer, the less stands in front of what forward reads first."""


class ImmediateStep(SyncStep):
    """The mode 'immediate'. Weights go up when the device has done its backward, which still reads them.

    Most of them are stepped by then, the last ones forward's first. So only some are sent at once; the others as these
    arrive, and of those that are stepped always the one that forward reads first. The rest of them arrives beside the
    next forward. The device's part is ordered behind the first ones, so that it runs while they are on their way.
    """

    waits_for_all = False

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self._held: list[HostChunk] = []
        """Stepped and not sent, in the order of arrival."""
        self._on_the_way: list[Any] = []
        """Marks of this step's copies up."""
        self._scaling = AS_IT_IS
        self._is_device_stepped = False

    def gather(self) -> None:
        """Wait for the threads that add up gradients of earlier micro-batches, and for no others."""
        for chunk in self.parts.chunks:
            self.reopened(chunk)

    def in_order(self) -> Sequence[HostChunk]:
        """As their gradients arrive: the host begins while backward runs."""
        return [chunk for chunk in self.parts.chunks if chunk.has_gradients or chunk.is_pending]

    def begin_chunk(self, chunk: HostChunk, scaling: Scaling, groups: Sequence[Mapping[str, Any]]) -> Stepping | None:
        chunk.freed(self.parts.lanes)
        arrived = chunk.arrived(self.parts.lanes)
        return chunk.begin(groups, self.parts.owner().state, chunk.gradients(), scaling, arrived=arrived)

    def _step_all(
        self,
        chunks: Sequence[HostChunk],
        scaling: Scaling,
        groups: Sequence[Mapping[str, Any]],
        begun: list[HostChunk],
    ) -> None:
        self._held, self._on_the_way = [], []
        self._scaling, self._is_device_stepped = scaling, False
        super()._step_all(chunks, scaling, groups, begun)
        while self._held:
            self._send_next()

    def stepped(self, chunk: HostChunk) -> None:
        self._held.append(chunk)
        self._on_the_way = [mark for mark in self._on_the_way if not self.parts.lanes.has_ended(mark)]
        while self._held and len(self._on_the_way) < ON_THE_WAY:
            self._send_next()
        if self._held:
            self.step_device_part(self._scaling)

    def step_device_part(self, scaling: Scaling) -> None:
        if not self._is_device_stepped:
            self._is_device_stepped = True
            super().step_device_part(scaling)

    def _send_next(self) -> None:
        """The one that arrived last, as it lies first in forward."""
        chunk = self._held.pop()
        self.send(chunk)
        self._on_the_way += chunk.uploads

    def commit(self) -> None:
        for chunk in self.parts.chunks:
            chunk.spend()  # not before: after a failure all gradients of the window are there
        super().commit()
