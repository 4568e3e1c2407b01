"""Max pooling in a captured graph becomes `ops.max_pool` where a device has kernels for it.

This is done in the graph that is captured of the model, before the compiler has made the pool's gradient: what it makes
of it differs from release to release, down to several operations that no longer name a pool (torch 2.13). The op
brings its own backward.

Which pools: of four dimensions, whose gradient is wanted, whose channels are innermost in memory (channels_last) and
enough for a kernel to move many bytes at once; of a type and size that the kernels know, dilation 1. All others stay,
and so do pools that only evaluate.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from deepseek_mp.ops.max_pool import fastest
from deepseek_mp.ops.pool_window import MOST_CELLS

FEWEST_CHANNELS = 8
"""Of 16 bits, what a thread moves at once. Not measured."""
_POOLS = (F.max_pool2d, torch.max_pool2d, torch.ops.aten.max_pool2d.default)
_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
_DEFAULTS = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}

Choice = Callable[[torch.device, torch.dtype], str | None]
"""The implementation for a device and a type; None: such pools stay."""


def replace_pools(graph: fx.GraphModule, choose: Choice = fastest) -> int:
    """Put our op in the place of the graph's pools, of those named above; how many they were.

    Args:
        graph: as `torch.compile` gives it to a backend, its nodes described by `example_value`.
        choose: the implementation for a pool.
    """
    replaced = 0
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in _POOLS:
            continue
        given = {**_DEFAULTS, **dict(zip(_ARGUMENTS, node.args, strict=False)), **node.kwargs}
        window, x = _window(given), given["input"]
        if window is None or not _suits(node, x):
            continue
        value = x.meta["example_value"]
        implementation = choose(value.device, value.dtype)
        if implementation is not None:
            _replace(node, x, (*window, given["ceil_mode"], implementation))
            replaced += 1
    if replaced:
        graph.recompile()
    return replaced


def _window(given: dict[str, Any]) -> tuple[list[int], list[int], list[int]] | None:
    """Kernel, stride and padding as pairs; None where our op has no such pool."""
    kernel, padding, dilation = (_pair(given[name]) for name in ("kernel_size", "padding", "dilation"))
    stride = kernel if given["stride"] in (None, (), []) else _pair(given["stride"])
    if kernel is None or stride is None or padding is None or dilation != [1, 1]:
        return None
    if kernel[0] * kernel[1] > MOST_CELLS:
        return None
    return (kernel, stride, padding) if isinstance(given["ceil_mode"], bool) else None


def _pair(size: Any) -> list[int] | None:
    """None for what is not known now but computed in the graph."""
    numbers = list(size) if isinstance(size, (list, tuple)) else [size]
    if len(numbers) not in (1, 2) or not all(type(number) is int for number in numbers):
        return None
    return numbers * 2 if len(numbers) == 1 else numbers


def _suits(node: fx.Node, x: Any) -> bool:
    if not isinstance(x, fx.Node):
        return False
    value, pooled = x.meta.get("example_value"), node.meta.get("example_value")  # a tuple if asked for indices
    if not isinstance(value, Tensor) or not isinstance(pooled, Tensor) or value.dim() != 4:
        return False
    channels = value.shape[1]
    return pooled.requires_grad and value.stride(1) == 1 and isinstance(channels, int) and channels >= FEWEST_CHANNELS


def _replace(node: fx.Node, x: fx.Node, how: tuple[Any, ...]) -> None:
    graph = node.graph
    with graph.inserting_before(node):
        both = graph.call_function(torch.ops.deepseek_mp.max_pool2d.default, (x, *how))
        values = graph.call_function(operator.getitem, (both, 0))
    both.meta = {name: value for name, value in node.meta.items() if name != "example_value"}
    values.meta = dict(node.meta)
    node.replace_all_uses_with(values)
    graph.erase_node(node)
