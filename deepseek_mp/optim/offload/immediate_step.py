"""`ImmediateStep`: the host steps each chunk as its gradients arrive, without having seen those of the others.

Nothing can make the step wait for the last gradient, so nothing can clip, skip or take back: no norm is taken and no
state is copied. A gradient is added up, stepped on, and the weight rounded, block by block in one go, which is the
least that the host's memory has to move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepseek_mp.optim.offload.host_chunk import HostChunk, Stepping
from deepseek_mp.optim.offload.sync_step import SyncStep
from deepseek_mp.optim.offload.verdict import Scaling, Verdict


class ImmediateStep(SyncStep):
    """The mode 'immediate'. Weights go up when the device has done its backward, which still reads them."""

    waits_for_all = False

    def step(self, verdict: Verdict) -> None:
        if verdict.reason is not None:
            self.forget()  # nothing of a window that is skipped is added to the next one
        super().step(verdict)

    def in_order(self) -> Sequence[HostChunk]:
        """As their gradients arrive: the host begins while backward runs."""
        return [chunk for chunk in self.parts.chunks if chunk.has_gradients or chunk.is_pending]

    def begin_chunk(self, chunk: HostChunk, scaling: Scaling, groups: Sequence[Mapping[str, Any]]) -> Stepping | None:
        self.reopened(chunk)  # gradients of earlier micro-batches are added up by then
        chunk.freed(self.parts.lanes)
        return chunk.begin(
            groups, self.parts.owner().state, chunk.gradients(), scaling, arrived=chunk.arrived(self.parts.lanes)
        )
