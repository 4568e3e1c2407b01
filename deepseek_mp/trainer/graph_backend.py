"""Inductor, called after repairs of the captured graph, and with a pass of ours (`nn.joint_graph`).

**Attention masks** of one column expanded are written out (`nn.graph_masks`).

**Max pooling.** What Inductor makes of it is slow on GPUs; kernels of ours take its place (`nn.graph_pooling`).

**Activation memory.** Under a budget the compiler's partitioner (torch._functorch.partitioners) computes again in the
backward what costs least by byte that it frees: elementwise work first, then the rest by its time. What it may compute
again says `trainer.recompute_rules`, how long that takes `trainer.recompute_costs`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch._dynamo  # so that its backends can be looked up before anything was compiled
import torch._functorch.config as partitioner
from torch import Tensor, fx
from torch._inductor import config

from deepseek_mp.nn.graph_masks import repair_masks
from deepseek_mp.nn.graph_pooling import replace_pools
from deepseek_mp.nn.joint_graph import FuseProducers
from deepseek_mp.trainer.recompute_costs import Roofline
from deepseek_mp.trainer.recompute_rules import rules

_FUSE = FuseProducers()
_TIME = Roofline()

Backend = Callable[[fx.GraphModule, Sequence[Tensor]], Callable[..., Any]]


def inductor(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """A backend for `torch.compile`; one object, since code compiled for another backend is compiled again."""
    repair_masks(graph)
    for part in graph.modules():  # checkpointed regions are graphs of their own inside it
        if isinstance(part, fx.GraphModule):
            replace_pools(part)
    compiler: Callable[..., Callable[..., Any]] = torch._dynamo.lookup_backend("inductor")  # noqa: SLF001
    if config.joint_custom_pre_pass is not None:  # the caller's own pass keeps its place
        return compiler(graph, inputs)
    return compiler(graph, inputs, config_patches={"joint_custom_pre_pass": _FUSE})


@cache
def backend(activation_memory_budget: float | None) -> Backend:
    """`inductor`, under a budget for what is kept for the backward: one object for each.

    Args:
        activation_memory_budget: share, from 0 to 1, of the bytes kept without a budget (None).
    """
    return inductor if activation_memory_budget is None else partial(_within, activation_memory_budget)


def _within(budget: float, graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    settings: dict[str, Any] = {"activation_memory_budget": budget}
    if partitioner.activation_memory_budget_runtime_estimator == "flops":  # the caller's own keeps its place
        settings["activation_memory_budget_runtime_estimator"] = _TIME
    with partitioner.patch(settings), rules():
        return inductor(graph, inputs)
