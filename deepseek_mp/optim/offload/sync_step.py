"""`SyncStep`: the host steps all chunks once the gradients of a window are complete; all of them, or none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from deepseek_mp.errors import MixedPrecisionError, explain
from deepseek_mp.optim.offload import rule
from deepseek_mp.optim.offload.crew import Crew
from deepseek_mp.optim.offload.device_part import DevicePart
from deepseek_mp.optim.offload.forward_waits import ForwardWaits
from deepseek_mp.optim.offload.host_chunk import HostChunk
from deepseek_mp.optim.offload.in_turn import UnderWay, in_turn
from deepseek_mp.optim.offload.lanes import Lanes
from deepseek_mp.optim.offload.verdict import Scaling, Verdict
from deepseek_mp.optim.offload.worker import Worker, finish


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a mode works with."""

    owner: Callable[[], Optimizer]
    """Has the groups and states, which loading replaces."""
    chunks: list[HostChunk]
    """In the order of arrival."""
    device: DevicePart
    lanes: Lanes
    waits: ForwardWaits
    worker: Callable[[], Worker]
    """Makes one, for the modes that need it."""
    undo: bool
    measure: bool
    """Whether the norm of the gradients may be wanted, of any bits."""
    crew: Crew
    is_beside: bool
    """Whether the device works beside the host."""


class SyncStep:
    """The mode 'sync', and the base of the others."""

    waits_for_all: bool = True
    """Whether all gradients of a window are on the host before any is stepped on."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._lander = parts.worker()  # another than that of steps, which would let a landing wait for all of a step
        self._landing: dict[int, Future[Any]] = {}
        self.broken: BaseException | None = None
        """Why the state is not whole: a step failed halfway and could not be taken back."""
        self.redone = 0
        """Chunks that were stepped twice in the last step."""

    @property
    def has_begun(self) -> bool:
        """Whether gradients of a window were given to its step before `step` is called."""
        return False

    def reopened(self, chunk: HostChunk) -> None:
        """Another gradient of this chunk is about to be sent down."""
        error = self._landed(chunk)
        if error is not None:
            raise error

    def _landed(self, chunk: HostChunk) -> BaseException | None:
        """Wait for the thread that adds a chunk's gradients up; whoever interrupts that finds it still at work."""
        landing = self._landing.get(chunk.number)
        error = None if landing is None else landing.exception()
        self._landing.pop(chunk.number, None)
        return error

    def complete(self, chunk: HostChunk, *, last: bool) -> None:
        """All gradients of a chunk are on their way; `last`: in the last backward of the window.

        Those of earlier ones are added up beside what the device does next.
        """
        if last:
            return
        try:
            self._landing[chunk.number] = self._lander.submit(chunk.land, self.parts.lanes)
        except BaseException:  # interrupted: nobody would wait for it
            finish(self._lander)
            raise

    def gather(self, *, is_scaled: bool) -> None:  # noqa: ARG002
        """Before the verdict on a step: wait for what it looks at.

        Args:
            is_scaled: whether a loss scaler steps.
        """
        self.land()

    def land(self) -> None:
        """Wait for gradients and add them."""
        for chunk in self.parts.chunks:
            self.land_chunk(chunk)

    def land_chunk(self, chunk: HostChunk) -> None:
        """The same for one chunk, which nobody steps on just now."""
        SyncStep.reopened(self, chunk)
        chunk.land(self.parts.lanes, measure=self.parts.measure)

    def forget(self) -> None:
        """The gradients of the window are not wanted."""
        for chunk in self.parts.chunks:
            self._landed(chunk)
            chunk.discard(self.parts.lanes)

    def settle(self) -> None:
        """Bring masters, states and weights to where the last `step` left them, for others to read."""

    def step(self, verdict: Verdict) -> None:
        """Apply or skip the step that the verdict is on.

        Raises:
            MixedPrecisionError: an earlier step failed halfway.
        """
        self.check_whole()
        if verdict.reason is None:
            self.apply(verdict.scaling)
            self.keep_ahead()

    def keep_ahead(self) -> None:
        """Copy the state that the next step will change, beside the device's forward and backward."""
        if self.parts.undo and self.parts.is_beside and self.parts.crew.threads > 1:
            for chunk in self.parts.chunks:
                chunk.keep_ahead()

    def check_whole(self) -> None:
        if self.broken is not None:
            passed = "a step after one that failed halfway and could not be taken back"
            change = "Load saved states of the model and of this optimizer"
            if not self.parts.undo:
                change += "; undo=True, which 'immediate' does not allow, takes such steps back"
            raise MixedPrecisionError(explain(passed, "steps from a whole state", change)) from self.broken

    def apply(self, scaling: Scaling) -> None:
        """Step all chunks."""
        self.prepare()
        groups = rule.options(self.parts.owner().param_groups)
        begun: list[HostChunk] = []
        try:
            self._step_all(self.in_order(), scaling, groups, begun)
            self.step_device_part(scaling)
        except BaseException as error:
            self.take_back(begun, error)
            raise
        self.commit()

    def in_order(self) -> Sequence[HostChunk]:
        """The chunks to be stepped: first those that forward reads first."""
        return [chunk for chunk in reversed(self.parts.chunks) if chunk.has_gradients]

    def _step_all(
        self,
        chunks: Sequence[HostChunk],
        scaling: Scaling,
        groups: Sequence[Mapping[str, Any]],
        begun: list[HostChunk],
    ) -> None:
        def begin(chunk: HostChunk) -> UnderWay | None:
            begun.append(chunk)
            return self.begin_chunk(chunk, scaling, groups)

        in_turn(chunks, begin, self.send, self.parts.crew)

    def prepare(self) -> None:
        """What can fail before anything is changed; and take over what others wrote into the weights."""
        pairs = [*self.parts.device.pairs, *(slot for chunk in self.parts.chunks for slot in chunk.slots)]
        for pair in pairs:
            pair.check_place()
        for pair in pairs:
            pair.adopt()

    def begin_chunk(self, chunk: HostChunk, scaling: Scaling, groups: Sequence[Mapping[str, Any]]) -> UnderWay | None:
        """Begin to step a chunk on the gradients of its masters; None if that is done."""
        chunk.freed(self.parts.lanes)
        return chunk.begin(groups, self.parts.owner().state, chunk.gradients(), scaling)

    def send(self, chunk: HostChunk) -> None:
        """Send a chunk's weights up, and let forward wait for them."""
        chunk.send(self.parts.lanes)
        self.parts.waits.sent(chunk.number, chunk.uploads)

    def step_device_part(self, scaling: Scaling) -> None:
        """Last, since nothing is kept of it: when it fails, its own state is unknown."""
        owner: Any = self.parts.owner()
        try:
            self.parts.device.step(owner.param_groups, owner.state, scaling)
        except BaseException as error:
            self.broken = error
            raise

    def take_back(self, begun: Iterable[HostChunk], error: BaseException) -> None:
        """Bring back the state before the step, on the host and on the device."""
        for chunk in begun:
            if not chunk.kept:
                continue
            if not self.parts.undo:
                self.broken = error
                continue
            chunk.restore(self.parts.owner().state)
            self.send(chunk)
        self.parts.waits.wait_all()

    def commit(self) -> None:
        """The step is applied."""
        for chunk in self.parts.chunks:
            chunk.kept = False
        if not self.parts.waits.attached:
            self.parts.waits.wait_all()
