"""`ImmediateStep`: the host steps each chunk as its gradients arrive, without having seen those of the others.

Nothing can make the step wait for the last gradient, so nothing can clip, skip or take back: no norm is taken and no
state is copied. A gradient is added up, stepped on, and the weight rounded, block by block in one go, which is the
least that the host's memory has to move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_mp.optim.offload.host_chunk import HostChunk
from deepseek_mp.optim.offload.in_turn import UnderWay
from deepseek_mp.optim.offload.sync_step import SyncStep
from deepseek_mp.optim.offload.verdict import Scaling


class ImmediateStep(SyncStep):
    """The mode 'immediate'. Weights go up when the device has done its backward, which still reads them."""

    waits_for_all = False

    def gather(self) -> None:
        """Wait for the threads that add up gradients of earlier micro-batches, and for no others."""
        for chunk in self.parts.chunks:
            self.reopened(chunk)

    def in_order(self) -> Sequence[HostChunk]:
        """As their gradients arrive: the host begins while backward runs."""
        return [chunk for chunk in self.parts.chunks if chunk.has_gradients or chunk.is_pending]

    def begin_chunk(self, chunk: HostChunk, scaling: Scaling, groups: Sequence[Mapping[str, Any]]) -> UnderWay | None:
        chunk.freed(self.parts.lanes)
        arrived = chunk.arrived(self.parts.lanes)
        return chunk.begin(groups, self.parts.owner().state, chunk.gradients(), scaling, arrived=arrived)

    def commit(self) -> None:
        for chunk in self.parts.chunks:
            chunk.spend()  # not before: after a failure all gradients of the window are there
        super().commit()
