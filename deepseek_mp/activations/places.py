"""Which module of a model runs now, by hooks that are there while a forward is looked at."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from torch import compiler, nn
from torch.utils.hooks import RemovableHandle


class _Hook:
    """Copies and pickles of the module, made while it is there, get one that does nothing."""

    def __init__(self, then: Callable[[nn.Module], None] | None = None) -> None:
        self._then = then

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if self._then is not None and not compiler.is_compiling():
            self._then(module)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


class Places:
    """The innermost module whose forward runs on this thread; modules inside compiled ones are not looked at."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {module: name for name, module in model.named_modules() if name}
        self._stack: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._thread = threading.get_ident()

    @property
    def current(self) -> str:
        """Qualified name; '' outside all submodules."""
        return self._stack[-1] if self._stack else ""

    def begin(self) -> None:
        """Put the hooks there."""
        enter, leave = _Hook(self._enter), _Hook(self._leave)
        inside: set[nn.Module] = set()
        for module in self._names:
            if module in inside or _is_compiled(module):
                inside.update(module.modules())
                continue
            self._handles.append(module.register_forward_pre_hook(enter))
            self._handles.append(module.register_forward_hook(leave))

    def end(self) -> None:
        """Take the hooks away."""
        handles, self._handles = self._handles, []
        for handle in handles:
            handle.remove()

    def _enter(self, module: nn.Module) -> None:
        if threading.get_ident() == self._thread:
            self._stack.append(self._names[module])

    def _leave(self, module: nn.Module) -> None:
        """Forget the module, and those inside it that an exception has ended: hooks that are called then too would
        make a compiler compile the module again in every forward.
        """
        if threading.get_ident() == self._thread and (name := self._names[module]) in self._stack:
            while self._stack.pop() != name:
                pass


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
