"""Attention masks in a captured graph, made such that PyTorch's fused attention takes them.

Its kernels refuse a mask whose last dimension is not contiguous in memory. Code that is traced builds such masks where
the eager code would build none: a model of transformers without padding expands one column to [batch, 1, query, key].
Attention then falls back to products of FP32 operands that keep the whole score matrix for backward: on an H200 a third
more time for a training step of BERT-base, and twice the memory. The mask is made contiguous, without the copies that
stand for its broadcast dimensions.
"""

from __future__ import annotations

from torch import Tensor, fx

from deepseek_mp.nn.attention_calls import ATTENTION

_MASK = 3
"""Position of `attn_mask` among the arguments."""


def repair_masks(graph: fx.GraphModule) -> None:
    """In place, where the graph's attention has masks that would be refused; also in graphs inside it.

    A mask is copied where it is read, as code may write into it after it was made; once for all layers that read one
    that nothing writes into.
    """
    for part in graph.modules():  # checkpointed regions are graphs of their own
        if isinstance(part, fx.GraphModule):
            _repair(part)


def _repair(graph: fx.GraphModule) -> None:
    repaired: dict[fx.Node, fx.Node] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target not in ATTENTION:
            continue
        mask = node.args[_MASK] if len(node.args) > _MASK else node.kwargs.get("attn_mask")
        if not isinstance(mask, fx.Node) or not _is_refused(mask):
            continue
        if mask not in repaired or _is_written(mask):
            with graph.graph.inserting_before(node):
                repaired[mask] = graph.graph.call_function(contiguous_mask, (mask,))
        node.replace_input_with(mask, repaired[mask])
    if repaired:
        graph.recompile()


def _is_written(mask: fx.Node) -> bool:
    """Whether the graph writes into the memory of a mask: its tensor without values has been through all of it."""
    version: int = mask.meta["example_value"]._version  # noqa: SLF001 - one counter for a tensor and its views
    return version > 0


def _is_refused(mask: fx.Node) -> bool:
    value = mask.meta.get("example_value")
    return isinstance(value, Tensor) and value.dim() >= 2 and value.stride(-1) != 1 and value.shape[-1] != 1


def contiguous_mask(mask: Tensor) -> Tensor:
    """A contiguous mask that broadcasts to the same: [B, H, Q, K], where B and H are cut to 1 if their stride is 0."""
    leading = [slice(0, 1) if stride == 0 else slice(None) for stride in mask.stride()[:-2]]
    return mask[(*leading, slice(None), slice(None))].contiguous()
