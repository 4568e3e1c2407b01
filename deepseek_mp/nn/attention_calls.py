"""Which calls of PyTorch's attention `ops.few_query_attention` takes over, in eager code and in captured graphs.

Calls of 1 to 16 queries with a mask over at least 256 keys, of operands [B, H, ., D] in 16 bits, without dropout,
`is_causal` or a gradient. PyTorch's kernels for masked attention do not split the keys, so that a token's step of a
decoder with a static cache keeps few of a GPU's processors busy. Without a mask its flash attention splits them itself
(`set_params_splitkv` in aten's flash_api.cpp), and such calls stay. So do those with `is_causal`: of few queries and
many keys PyTorch's sees the first keys only, which nobody means. The call inside `nn.MultiheadAttention` is not seen,
neither here nor by the compiler: for both PyTorch's function around it is one operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from deepseek_mp.ops.few_query_attention import MOST_QUERIES, fastest

FEWEST_KEYS = 256
"""Fewer are read by the programs of a head each as fast as a second launch takes. Not measured."""
ATTENTION = (scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)
"""What it is called in captured graphs, of a model and of a program that was exported."""
_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}

Choice = Callable[[torch.device, torch.dtype, int], str | None]
"""The implementation for a device, a dtype and values of a head; None: such calls stay."""


def taken_over(
    args: Sequence[Any], kwargs: Mapping[str, Any], value_of: Callable[[Any], Any], choose: Choice = fastest
) -> tuple[Any, ...] | None:
    """The arguments of our op for a call of PyTorch's attention that it takes over; None: the call stays.

    Args:
        args: of the call, with `kwargs`.
        kwargs: see `args`.
        value_of: the tensor behind an argument, real or one that only has the shape.
        choose: the implementation.
    """
    given = {**_DEFAULTS, **dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
    if set(given) != set(_ARGUMENTS) or given["dropout_p"] != 0.0 or given["is_causal"] is not False:
        return None
    query, key, value, mask = (value_of(given[name]) for name in _ARGUMENTS[:4])
    if not all(isinstance(part, Tensor) and part.dim() == 4 for part in (query, key, value)):
        return None
    if not (isinstance(mask, Tensor) and 2 <= mask.dim() <= 4 and _suit(query, key, value, mask, given["enable_gqa"])):
        return None
    width = query.shape[3]
    scale = width**-0.5 if given["scale"] is None else given["scale"]
    wide = max(width, value.shape[3])
    implementation = choose(query.device, query.dtype, wide) if isinstance(scale, (int, float)) else None
    if implementation is None:
        return None
    return (*(given[name] for name in _ARGUMENTS[:4]), float(scale), implementation)


def _suit(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, grouped: bool) -> bool:
    """Whether sizes that are known suit; a batch and a number of keys may be symbols, which no guard is put on."""
    (heads, queries, width), (shared, keys), wide = query.shape[1:], key.shape[1:3], value.shape[3]
    if not all(type(size) is int and size > 0 for size in (heads, queries, width, shared, wide)):
        return False
    if queries > MOST_QUERIES or (type(keys) is int and keys < FEWEST_KEYS):
        return False
    if heads % shared or (heads != shared and not grouped) or value.shape[1] != shared or key.shape[3] != width:
        return False
    if any(part.requires_grad for part in (query, key, value, mask)) and torch.is_grad_enabled():
        return False
    alike = query.dtype is key.dtype is value.dtype and mask.device == query.device == key.device == value.device
    contiguous = all(_is_one(part.stride(3)) for part in (key, value))
    return alike and contiguous and _same(query.shape[0], key.shape[0]) and _same(key.shape[0], value.shape[0])


def _is_one(stride: Any) -> bool:
    return type(stride) is int and stride == 1


def _same(left: Any, right: Any) -> bool:
    """Whether two sizes are known to be equal, symbols by their name."""
    if type(left) is int and type(right) is int:
        return left == right
    return str(left) == str(right)


class FewQueryCalls(TorchFunctionMode):
    """A region in which eager calls of attention of few queries are ours.

    Each operation and each attribute of a tensor costs the host some 2 µs more inside, so it is for calls that are
    recorded once and replayed; a compiler gets a graph with the calls replaced instead (`nn.graph_attention`).
    """

    def __init__(self, choose: Choice = fastest) -> None:
        super().__init__()
        self._choose = choose

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is scaled_dot_product_attention:
            ours = taken_over(args, given, lambda leaf: leaf, self._choose)
            if ours is not None:
                return torch.ops.deepseek_mp.few_query_attention(*ours)
        return func(*args, **given)
