"""`FloatingModel`: a trained model without the rounding, in FP32 or BF16, compiled as the INT8 model is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.nn.nested import map_leaves
from deepseek_mp.qat.compiled import CompiledGraph
from deepseek_mp.qat.constants import fold_constants
from deepseek_mp.qat.norms import fold_norms
from deepseek_mp.qat.simulated import SimulatedModel


class FloatingModel(nn.Module):
    """Is called as the original is, without gradients: what INT8 is compared with.

    Tensors of floating type go in as the format has them and come out in FP32. BatchNorms are folded, weights are
    constants for the compiler, and calls pass no guards, so that both have the same advantages.

    Args:
        simulated: stays as it is.
        dtype: of weights and activations.
    """

    def __init__(self, simulated: SimulatedModel, dtype: torch.dtype) -> None:
        super().__init__()
        graph = simulated.evaluated()
        for node in graph.graph.find_nodes(op="call_module"):
            if hasattr(graph.get_submodule(str(node.target)), "activation_post_process"):
                node.replace_all_uses_with(node.args[0])
                graph.graph.erase_node(node)
        fold_norms(graph)
        with torch.no_grad():
            fold_constants(graph)
        graph._apply(lambda tensor: _cast(tensor, dtype))  # noqa: SLF001 - `to` would make complex tensors real
        self.graph, self.dtype = graph, dtype
        self._sizes = simulated.sizes
        self._compiled = CompiledGraph(self.graph)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The outputs, in FP32; `BatchError` for sizes that the graph was not made for."""
        self._sizes.check(args, kwargs)
        args, kwargs = map_leaves((args, kwargs), lambda leaf: _cast(leaf, self.dtype))
        return map_leaves(self._compiled(*args, **kwargs), lambda leaf: _cast(leaf, torch.float32))


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
