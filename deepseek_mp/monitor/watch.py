"""How the monitor learns that the model is called, at the cost of one small call per step.

A forward pre-hook on the model itself, which torch.compile traces to nothing. Where the model was
compiled by `module.compile()`, hooks run inside the compiled code, so there the call into it is
wrapped instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from deepseek_mp.monitor import internals
from deepseek_mp.nn.again import is_computed_again

Called = Callable[[bool], None]
"""Called before each call of the model; its argument says whether the model's module hooks have already run."""


class RootHook:
    """The forward pre-hook. Copies and pickles of the model get one that does nothing."""

    def __init__(self, called: Called | None = None) -> None:
        self._called = called

    def __call__(self, _module: nn.Module, _args: Any) -> None:
        if torch.compiler.is_compiling() or self._called is None or is_computed_again():
            return
        self._called(True)

    def __reduce__(self) -> tuple[Any, ...]:
        return RootHook, ()


class CountedCall:
    """What `module.compile()` made the module call, with a note of each call before it."""

    def __init__(self, inner: Callable[..., Any], called: Called) -> None:
        self.inner = inner
        self._called = called

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            self._called(False)
        return self.inner(*args, **kwargs)


class Watch:
    """Watches one model until `detach`."""

    def __init__(self, model: nn.Module, called: Called) -> None:
        self._model, self._called = model, called
        self._handle: RemovableHandle | None = None

    def attach(self) -> bool:
        """Watch the model in the way that suits it now; True if that had changed."""
        call = internals.compiled_call(self._model)
        if call is None:
            if self._handle is not None:
                return False
            self._handle = self._model.register_forward_pre_hook(RootHook(self._called))
            return True
        if isinstance(call, CountedCall):
            return False
        self.detach()
        internals.set_compiled_call(self._model, CountedCall(call, self._called))
        return True

    def detach(self) -> None:
        """Leave the model as it was before `attach`."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        call = internals.compiled_call(self._model)
        if isinstance(call, CountedCall):
            internals.set_compiled_call(self._model, call.inner)
