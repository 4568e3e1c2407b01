"""Looks at calls of modules in one forward of a model, and leaves no hook behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from deepseek_mp.nn.deferred import is_pending
from deepseek_mp.nn.nested import tensors

Look = Callable[[Any, Any, Any], None]
"""Given a call's positional arguments, its keyword arguments and its output, without what nobody has computed yet."""
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
        args, kwargs, output = (_computed(tree) for tree in (args, kwargs, output))
        for looks in self._looks:
            if (look := looks.get(module)) is not None:
                look(args, kwargs, output)
        if module is self._model:
            self.end()


def _computed(tree: Any) -> Any:
    """The tree as it is, or the tensors in it that are there already: a look must not be what computes the others.

    They may be anywhere in it: models of transformers give their scores as a field of their output.
    """
    found = list(tensors(tree))
    there = [tensor for tensor in found if not is_pending(tensor)]
    return tree if len(there) == len(found) else there
