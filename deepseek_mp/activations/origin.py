"""Where a saved tensor comes from: whether it is a parameter, a buffer, a view of one, or a cast of one."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

_VIEWS_AND_CASTS = frozenset(
    f"{name}Backward0"
    for name in (
        "ToCopy", "T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Alias", "Expand", "Clone",
        "Squeeze", "Unsqueeze", "Slice", "Select", "Split", "SplitWithSizes", "Unbind",
    )
)  # fmt: skip
_LONGEST = 8


class Held:
    """The memory that a model holds anyway."""

    def __init__(self, model: nn.Module) -> None:
        tensors = chain(model.parameters(), model.buffers())
        self._places = {place for tensor in tensors if (place := _place(tensor))}

    def has(self, x: Tensor) -> bool:
        """Whether x is a parameter, a buffer or a view of one."""
        return isinstance(x, nn.Parameter) or _place(x) in self._places

    def has_source(self, x: Tensor) -> bool:
        """Whether x is a parameter in another format or layout, such as autocast and `nn.weight_casts` make.

        It is a part of a parameter, or made of parameters alone, beside what requires no gradient, and has as many
        values as one of them: a table of embeddings is a parameter too, but what is read from it is an activation.
        """
        node: Any = x.grad_fn
        for _ in range(_LONGEST):
            if node is None or node.name() not in _VIEWS_AND_CASTS:
                break
            node = node.next_functions[0][0]
        if node is None:
            return False
        if hasattr(node, "variable"):
            return self.has(node.variable)
        sources = [source for source, _ in node.next_functions if source]
        variables = [getattr(source, "variable", None) for source in sources]
        held = [variable for variable in variables if variable is not None and self.has(variable)]
        return len(held) == len(variables) and any(variable.numel() == x.numel() for variable in held)


def is_plain(x: Tensor) -> bool:
    """Whether x is an ordinary dense-layout tensor or parameter, and no subclass with a behaviour of its own."""
    return type(x) in (Tensor, nn.Parameter) and x.layout is torch.strided


def _place(x: Tensor) -> int:
    """Address of the tensor's memory; 0 where it has none of its own."""
    return x.untyped_storage().data_ptr() if is_plain(x) else 0
