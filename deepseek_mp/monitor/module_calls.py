"""Looks at calls of modules in one forward of a model, and leaves no hook behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from deepseek_mp.nn.deferred import is_pending

Look = Callable[[Any, Any, Any], None]
"""Given a call's positional arguments, its keyword arguments and its output, None if nobody computes that."""
_Left = Callable[[nn.Module, Any, Any, Any], None]


class CallHook:
    """A forward hook. Copies and pickles of the module, made while it is there, get one that does nothing."""

    def __init__(self, left: _Left | None = None) -> None:
        self._left = left

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._left is not None:
            self._left(module, args, kwargs, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return CallHook, ()


class ModuleCalls:
    """Calls the looks of each module after its forward, until the model's own forward has ended.

    Only the modules looked at are hooked, and not all of them globally: PyTorch keeps something of every global hook
    that is given keyword arguments, also when it is removed.
    """

    def __init__(self, model: nn.Module, looks: Iterable[Mapping[nn.Module, Look]]) -> None:
        self._model, self._looks = model, list(looks)
        modules = dict.fromkeys([model, *(module for those in self._looks for module in those)])
        hook = CallHook(self._left)
        self._handles: list[RemovableHandle] = [
            module.register_forward_hook(hook, with_kwargs=True) for module in modules
        ]

    def end(self) -> None:
        """Take the hooks away."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()

    def _left(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen = None if is_pending(output) else output  # a look must not be what computes it
        for looks in self._looks:
            if (look := looks.get(module)) is not None:
                look(args, kwargs, seen)
        if module is self._model:
            self.end()
