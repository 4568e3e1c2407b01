"""Sizes of inputs that an exported graph leaves free, such as the batch, also in compiled code.

Code compiled for free sizes holds for all that meet what the compiler has assumed of them, which it says in `guards`.
It assumes of each that it is 2 at least. Strides are those of the inputs at hand, as they are for all that are alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

LEAST = 2


class FreeSizes:
    """Those of a graph.

    Args:
        graph: exported, all its placeholders tensors.
    """

    def __init__(self, graph: fx.Graph) -> None:
        values = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
        self._dims = [[at for at, size in enumerate(value.shape) if isinstance(size, torch.SymInt)] for value in values]

    def alike(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """Equal for inputs that differ in free sizes only."""
        shapes = (
            tuple(None if at in dims else size for at, size in enumerate(x.shape))
            for x, dims in zip(inputs, self._dims, strict=True)
        )
        return tuple((x.device, x.dtype, shape, x.stride()) for x, shape in zip(inputs, shapes, strict=True))

    def may_be_free(self, inputs: Sequence[Tensor]) -> bool:
        """Whether there are free sizes, all of which compiled code can leave free."""
        sizes = [size for _, _, size in self._of(inputs)]
        return bool(sizes) and min(sizes) >= LEAST

    def opened(self, inputs: Sequence[Tensor]) -> Opened:
        """Tensors without values to compile with."""
        return Opened(inputs, self._dims)

    def _of(self, inputs: Sequence[Tensor]) -> Iterator[tuple[int, int, int]]:
        for index, (x, dims) in enumerate(zip(inputs, self._dims, strict=True)):
            yield from ((index, at, x.shape[at]) for at in dims)


class Opened:
    """Inputs whose free sizes are symbols, one for each: `fakes`, to compile with.

    Once something was compiled with them, it knows for which sizes the code holds.
    """

    def __init__(self, inputs: Sequence[Tensor], dims: Sequence[Sequence[int]]) -> None:
        self._environment = ShapeEnv()
        mode = FakeTensorMode(shape_env=self._environment)
        self.fakes: list[Tensor] = []
        self._symbols: list[tuple[int, int, Any]] = []
        for index, (x, free) in enumerate(zip(inputs, dims, strict=True)):
            kinds = [DimDynamic.DYNAMIC if at in free else DimDynamic.STATIC for at in range(x.dim())]
            context: Any = StatelessSymbolicContext(dynamic_sizes=kinds)
            sizes = mode.from_tensor(x, symbolic_context=context, source=ConstantSource(f"input_{index}"))
            shape: Any = sizes.shape
            with mode:  # `sizes` has symbols in strides that are multiples of free sizes for these inputs
                self.fakes.append(torch.empty_strided(shape, x.stride(), dtype=x.dtype, device=x.device))
            self._symbols += [(index, at, shape[at].node.expr) for at in free]

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the code holds for these inputs, which are alike."""
        sizes = {symbol: inputs[index].shape[at] for index, at, symbol in self._symbols}
        if min(sizes.values()) < LEAST:
            return False
        return all(guard.expr.xreplace(sizes) == True for guard in self._environment.guards)  # noqa: E712 - of sympy
