"""Attention of few queries over many keys, `few_query_attention`: a step of a decoder that generates token by token.

Such a step reads all keys and values once and multiplies little. A program for each head leaves most of a GPU idle; so
the keys are split too, each part has a softmax of its own, and the parts are put together by the logarithms of their
sums ("Flash-Decoding", Dao et al., 2023). Heads that share keys and values read them together. Positions that a mask
lets no query see are not read.

    implementation   operands           where
    reference        fp32, bf16, fp16   any device; slow: the scores are in memory
    triton           bf16, fp16         GPUs of NVIDIA and AMD; up to 256 values a head

Scores, softmax and sums are fp32; for several queries Triton's kernel rounds the softmax, before it is divided by its
sum, to 16 bits, as PyTorch's kernels do. A query that sees nothing gets zeros, as PyTorch's (2.11, 2.13) gives it.

It is an opaque op, the same in eager and in compiled code; it has no gradient. Its time alone has not been measured
on a GPU yet; `benchmarks/few_query_attention.py` does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deepseek_mp.errors import ConfigError, ShapeError, explain
from deepseek_mp.ops.choose import few_query_attention_of, kernel_runs

MOST_QUERIES = 16
"""Of a sequence; with more, programs of PyTorch's kernels have enough to multiply. Not measured."""
MOST_WIDTH = 256
"""Values of a head that a program of ours holds."""

CLOSE = 2e-2
"""Of the kernels' numbers in 16 bits to those in FP32, relative, when they are compared."""

_library = torch.library.Library("deepseek_mp", "FRAGMENT")


def few_query_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, *, implementation: str
) -> Tensor:
    """softmax(query @ key.T * scale + mask) @ value for each head; heads h * G to h * G + G - 1 share key and value h.

    Args:
        query: [B, H, Q, D] in fp32 (reference only), bf16 or fp16.
        key: [B, H / G, L, D] of the same dtype, like `value` [B, H / G, L, Dv] in any strides; Triton's kernel copies
            it first if the last dimension is not contiguous.
        value: see `key`.
        mask: that broadcasts to [B, H, Q, L]: boolean, True where a query sees a key, or floating, added to the scores.
        scale: of the scores, often D ** -0.5.
        implementation: reference or triton.

    Returns:
        [B, H, Q, Dv] in the dtype of the query; in memory [B, Q, H, Dv], as the layer after it reads it.

    Raises:
        ShapeError: shapes that do not belong together.
        ConfigError: another dtype, or an implementation that does not take these operands.
    """
    out: Tensor = torch.ops.deepseek_mp.few_query_attention(query, key, value, mask, scale, implementation)
    return out


def fastest(device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """The implementation for heads of `width` values, once compared with the reference; None: only that slow one."""
    fits = dtype in (torch.bfloat16, torch.float16) and 0 < width <= MOST_WIDTH
    return "triton" if fits and _kernels_run(device, dtype, width) else None


@cache
def _kernels_run(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    def once() -> None:
        draw = torch.Generator().manual_seed(0)
        key, value = (torch.randn(1, 2, 300, width, generator=draw, device="cpu").to(device, dtype) for _ in range(2))
        for heads, queries in ((2, 1), (8, 1), (8, MOST_QUERIES)):
            query = torch.randn(1, heads, queries, width, generator=draw, device="cpu").to(device, dtype)
            seen = (torch.rand(queries, 300, generator=draw, device="cpu") < 0.5).to(device)
            found = few_query_attention_of("triton")(query, key, value, seen, 0.125)
            exact = few_query_attention_of("reference")(query.float(), key.float(), value.float(), seen, 0.125)
            if not torch.allclose(found.float(), exact, rtol=CLOSE, atol=CLOSE / 5):
                raise ArithmeticError(f"{queries} queries of {heads} heads give other numbers than the reference")

    return kernel_runs(device, "attention of few queries", once)


def _run(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, implementation: str) -> Tensor:
    _check(query, key, value, mask)
    return few_query_attention_of(implementation)(query, key, value, mask, scale)


def _shapes(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, _scale: float, _implementation: str
) -> Tensor:
    _check(query, key, value, mask)
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.shape[3])).transpose(1, 2)


def _check(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    if not _belong(query, key, value, mask):
        given = [query, key, value, *([] if mask is None else [mask])]
        passed = f"attention of {' and '.join(str(list(part.shape)) for part in given)}"
        allowed = "query [B, H, Q, D], key [B, H / G, L, D], value [B, H / G, L, Dv], a mask that broadcasts"
        raise ShapeError(explain(passed, allowed, "Bring the operands into these shapes"))
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16) or {key.dtype, value.dtype} != {query.dtype}:
        passed = f"attention in {query.dtype}, {key.dtype} and {value.dtype}"
        raise ConfigError(explain(passed, "one of fp32, bf16 and fp16", "Cast the operands to one of them"))
    if mask is not None and not (mask.dtype is torch.bool or mask.is_floating_point()):
        raise ConfigError(explain(f"a mask in {mask.dtype}", "bool or a floating dtype", "Compare it with 0"))


def _belong(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    if not query.dim() == key.dim() == value.dim() == 4 or key.shape[:3] != value.shape[:3]:
        return False
    (batch, heads, queries, width), (_, shared, length, _) = query.shape, key.shape
    if key.shape[0] != batch or key.shape[3] != width or shared == 0 or heads % shared:
        return False
    if mask is None:
        return True
    whole = (batch, heads, queries, length)[4 - mask.dim() :]
    return mask.dim() <= 4 and all(found in (1, size) for found, size in zip(mask.shape, whole, strict=True))


_library.define(
    "few_query_attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, str implementation)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("few_query_attention", _run, "CompositeExplicitAutograd")
torch.library.register_fake("deepseek_mp::few_query_attention", _shapes, lib=_library)


@register_flop_formula(torch.ops.deepseek_mp.few_query_attention)
def _operations(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_how: Any, **_: Any) -> int:
    """Those of both products, as PyTorch counts its attention: a mask saves none."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])
