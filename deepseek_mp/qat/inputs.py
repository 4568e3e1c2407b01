"""What an INT8 model is called with: by place or by name, and of the dtypes and sizes that its graph was made for.

What its example inputs gave by name is taken by name alone: their order need not be that of the model's forward, which
the graph does not know.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from deepseek_mp.errors import BatchError, explain
from deepseek_mp.programs import Signature, signature_of
from deepseek_mp.programs.flat_call import LastCall
from deepseek_mp.programs.signature import paths_of, plain


class Inputs:
    """The inputs of a program, known by the names that they have in the model's forward.

    Args:
        program: what is called.
        graph: its module.
        signature: what the inputs have to be; None: what the program says, as it was exported.
    """

    def __init__(self, program: ExportedProgram, graph: fx.GraphModule, signature: Signature | None = None) -> None:
        spec = program.call_spec.in_spec
        assert spec is not None, "an exported program knows what it takes"
        self._spec = spec
        args, self._keywords = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
        named = list(inspect.signature(graph.forward).parameters.values())
        by_name = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in named[len(args) :]]
        self._parameters = inspect.Signature([*named[: len(args)], *by_name])
        places = [one.name for one in named[: len(args)]]
        indices = paths_of(plain({**dict(zip(places, args, strict=True)), **self._keywords}))
        paths = self._paths = sorted(indices, key=indices.__getitem__)
        if signature is None:
            # The exporter takes 2 for the least size whatever the graph does; its operations take empty batches too.
            signature = signature_of(program, paths, strict=False).with_least(0)
        self.signature = signature
        self._last = LastCall()

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """`BatchError` for a call that the program was not made for."""
        if not self._last.is_like(args, kwargs):
            self.as_exported(args, kwargs)
            self._last.remember(args, kwargs)

    def as_exported(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call, checked, with arguments by place, and in containers, as they were when the program was exported."""
        try:
            given = self._parameters.bind(*args, **kwargs).arguments
        except TypeError as error:
            passed, allowed = f"a call that does not fit ({error})", str(self.signature)
            how = f"{' and '.join(self._keywords)} by name" if self._keywords else "by place or by name"
            raise BatchError(explain(passed, allowed, f"Pass those, {how}")) from error
        found = paths_of(plain(given))
        self.signature.check_leaves(found)
        positional, named = pytree.tree_unflatten([found[path] for path in self._paths], self._spec)
        return positional, named
