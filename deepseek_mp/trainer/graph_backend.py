"""Inductor, called after repairs of the captured graph, and with a pass of ours (`nn.joint_graph`).

**Attention masks.** PyTorch's fused attention kernels refuse a mask whose last dimension is not contiguous in
memory. Code that is traced builds such masks where the eager code would build none: a model of transformers
without padding expands one column to [batch, 1, query, key]. Attention then falls back to products of FP32
operands that keep the whole score matrix for backward: on an H200 a third more time for BERT-base, and
twice the memory. The mask is made contiguous, without the copies that stand for its broadcast dimensions.

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
from torch.nn.functional import scaled_dot_product_attention

from deepseek_mp.nn.graph_pooling import replace_pools
from deepseek_mp.nn.joint_graph import FuseProducers
from deepseek_mp.trainer.recompute_costs import Roofline
from deepseek_mp.trainer.recompute_rules import rules

_FUSE = FuseProducers()
_TIME = Roofline()
_MASK = 3
"""Position of `attn_mask` among the arguments."""

Backend = Callable[[fx.GraphModule, Sequence[Tensor]], Callable[..., Any]]


def inductor(graph: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """A backend for `torch.compile`; one object, since code compiled for another backend is compiled again."""
    for part in graph.modules():  # checkpointed regions are graphs of their own inside it
        if isinstance(part, fx.GraphModule):
            _repair_masks(part)
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


def _repair_masks(graph: fx.GraphModule) -> None:
    repaired: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target is not scaled_dot_product_attention:
            continue
        mask = node.args[_MASK] if len(node.args) > _MASK else node.kwargs.get("attn_mask")
        if not isinstance(mask, fx.Node) or not _is_refused(mask):
            continue
        if mask not in repaired:
            with graph.graph.inserting_after(mask):
                repaired[mask] = graph.graph.call_function(contiguous_mask, (mask,))
        node.replace_input_with(mask, repaired[mask])
    if repaired:
        graph.recompile()


def _is_refused(mask: fx.Node) -> bool:
    value = mask.meta.get("example_value")
    return isinstance(value, Tensor) and value.dim() >= 2 and value.stride(-1) != 1 and value.shape[-1] != 1


def contiguous_mask(mask: Tensor) -> Tensor:
    """A contiguous mask that broadcasts to the same: [B, H, Q, K], where B and H are cut to 1 if their stride is 0."""
    leading = [slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride()[:-2]]
    return mask[(*leading, slice(None), slice(None))].contiguous()
