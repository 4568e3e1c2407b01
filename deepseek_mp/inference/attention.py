"""Attention in served models: of few queries by `ops.few_query_attention`, in compiled code and in recorded calls.

In compiled code masks are also made such that PyTorch's own kernels take them (`nn.graph_masks`). Eager code that is
not recorded keeps PyTorch's: there the host's time counts, and it would need more of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from deepseek_mp.nn.attention_calls import FewQueryCalls
from deepseek_mp.nn.graph_attention import replace_attention
from deepseek_mp.nn.graph_masks import repair_masks
from deepseek_mp.ops import few_query_attention
from deepseek_mp.ops.dtypes import torch_dtype

Call = Callable[[tuple[Any, ...], dict[str, Any]], Any]
"""From the positional and the keyword arguments to the outputs."""
_WIDTH = 64
"""Of a head, to ask whether a device has kernels at all."""


def is_rewritten(device: torch.device, format: str) -> bool:
    """Whether compiled code has it, for a device and the format of activations."""
    return device.type != "cpu" or _has_kernels(device, format)


def recorded(call: Call, device: torch.device, format: str) -> Call:
    """The call as it is to be recorded, where it is not compiled."""
    if not _has_kernels(device, format):
        return call

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with FewQueryCalls(few_query_attention.fastest):
            return call(args, kwargs)

    return run


def rewrite(graph: fx.GraphModule) -> None:
    """In place, a graph as `torch.compile` gives it to a backend: attention replaced, masks repaired."""
    replace_attention(graph, few_query_attention.fastest)
    repair_masks(graph)


def _has_kernels(device: torch.device, format: str) -> bool:
    return few_query_attention.fastest(device, torch_dtype(format), _WIDTH) is not None
