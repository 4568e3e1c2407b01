"""`ForwardWaits`: forward waits for a chunk's weights where they are first read, not for all of them at its start."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deepseek_mp.optim.offload.lanes import Lanes


class Sending(Protocol):
    """What is to send the weights of a chunk; a future is one."""

    def exception(self) -> BaseException | None:
        """Wait until they are on their way; what it has failed with."""


class ForwardWaits:
    """Hooks on the modules that own parameters: each waits for the chunks of its own.

    A parameter that is read outside of its module's forward would not be waited for. So the chunks of parameters that
    got a gradient without a call of their module are waited for at the start of the model's forward from then on. What
    runs without gradients shows nothing of that kind, so that all chunks are waited for at its start.

    Args:
        lanes: of the device.
    """

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._outstanding: dict[int, Sequence[Any]] = {}
        self._expected: dict[int, Sending] = {}
        """What sends the weights of a chunk, beside whoever is here."""
        self._chunk_of: dict[int, int] = {}
        self._called: set[int] = set()
        self._early: set[int] = set()
        self._handles: list[Any] = []
        self.attached = False

    def attach(self, model: nn.Module, chunk_of: Iterable[tuple[Tensor, int]], *, reading: Callable[[], None]) -> None:
        """Hook a model whose parameters are in these chunks; `reading` is called before its state is read.

        A part of the model may be saved or loaded, so that each module that owns parameters has these hooks.
        """
        self._chunk_of = {id(parameter): chunk for parameter, chunk in chunk_of}
        for module in model.modules():
            own = frozenset(id(p) for p in module.parameters(recurse=False) if id(p) in self._chunk_of)
            if own:
                self._handles += [
                    module.register_forward_pre_hook(_Hook(partial(self._module, own)), prepend=True),
                    module.register_state_dict_pre_hook(_Hook(reading)),
                    module.register_state_dict_pre_hook(_Hook(self.wait_all)),
                    # else a copy that is late would replace what was loaded
                    module.register_load_state_dict_pre_hook(_Hook(self.wait_all)),
                ]
        self._handles.append(model.register_forward_pre_hook(_Hook(self._model), prepend=True))
        self.attached = True

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self.attached = [], False

    def release(self, handles: Iterable[Any]) -> None:
        """The optimizer is gone: remove these hooks, too, and let the host wait, as nobody else will know of copies."""
        # The host's thread may have held it last: then a forward takes some of these meanwhile.
        for marks in list(self._outstanding.values()):
            for mark in marks:
                self._lanes.land(mark)
        self._outstanding = {}
        self.detach()
        for handle in handles:
            handle.remove()

    def sent(self, chunk: int, marks: Sequence[Any]) -> None:
        """The weights of a chunk are on their way."""
        self._outstanding[chunk] = marks
        if chunk not in self._expected:
            self._called = set()

    def expect(self, chunk: int, sending: Sending) -> None:
        """When that has ended, the weights of a chunk are on their way; the next forward may begin before."""
        self._expected[chunk] = sending
        self._called = set()

    def until_sent(self, chunks: Iterable[int]) -> None:
        """Let the host wait until these are on their way.

        Whatever that has failed with is raised, once; nothing more is expected then.
        """
        for chunk in chunks:
            sending = self._expected.get(chunk)
            error = None if sending is None else sending.exception()  # an interrupt leaves it expected
            if error is not None:
                self.expect_nothing()
                raise error
            self._expected.pop(chunk, None)

    def expect_nothing(self) -> None:
        """What was expected has failed, or was given up."""
        self._expected = {}

    def graded(self, parameter: Tensor) -> None:
        """A gradient of the parameter has come."""
        if id(parameter) not in self._called:
            self._early.add(self._chunk_of[id(parameter)])

    def wait(self, chunks: Iterable[int]) -> None:
        """Let the device wait for these chunks."""
        for chunk in chunks:
            self.until_sent([chunk])
            for mark in self._outstanding.get(chunk, ()):
                self._lanes.wait(mark)
            self._outstanding.pop(chunk, None)  # last, so that an interrupt loses nothing

    def wait_all(self) -> None:
        self.until_sent(sorted(self._expected))
        self.wait(sorted(self._outstanding))

    def _model(self) -> None:
        """The model is about to run."""
        if torch.is_grad_enabled():
            self.wait(sorted(self._early))
        else:
            self.wait_all()

    def _module(self, parameters: frozenset[int]) -> None:
        """A module that owns these parameters is about to run."""
        self._called |= parameters
        self.wait(sorted({self._chunk_of[parameter] for parameter in parameters}))


class _Hook:
    """A hook on a model. Copies of the model have weights of their own: theirs does nothing."""

    def __init__(self, action: Callable[[], None] | None) -> None:
        self._action = action

    def __call__(self, *_args: Any) -> None:
        if self._action is not None:
            self._action()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None,)
