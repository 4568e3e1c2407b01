"""`few_query_attention` by Triton: programs over key heads and parts of the keys, then one launch that combines them.

The sizes are not measured. Where there are as many key heads as programs are wanted, keys are not split and there is
nothing to combine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.ops.early_launch import early
from deepseek_mp.ops.triton.current_device import on_device
from deepseek_mp.ops.triton.few_query_attention_kernel import combine_kernel, one_row_kernel, rows_kernel

DTYPES = (torch.bfloat16, torch.float16)
BLOCK_VALUES = 8192
"""Of the keys that a program has at a time, and as many values: 32 KB together."""
MOST_POSITIONS = 128
MOST_ROWS = 64
"""Of queries in a program; more have programs of their own, which read the keys again."""
PER_PROCESSOR = 2
"""Programs that run at the same time: 101 registers a thread leave room for two with a single row (sm_90)."""
MOST_PARTS = 128
COMBINED = 32
"""Values of a row in a program that combines."""
WARPS = 4
WARPS_FOR_MORE = 8
"""From 32 rows, whose sums four would not hold in registers; and for one, whose loads are then all under way at once,
while the compiler takes turns between them and sums for four (sm_90)."""


@dataclass(frozen=True, slots=True)
class Parts:
    """How the work is cut: rows of a program, positions read at a time, parts of the keys, warps."""

    rows: int
    positions: int
    parts: int
    warps: int


def cut(heads: int, rows: int, length: int, width: int, processors: int) -> Parts:
    """For rows of each of the key heads of all batches: parts of equally many blocks, to fill the processors."""
    block_rows = min(MOST_ROWS, max(16, triton.next_power_of_2(rows)))
    block = BLOCK_VALUES // 2 if block_rows == MOST_ROWS else BLOCK_VALUES
    positions = max(16, min(MOST_POSITIONS, block // _padded(width)))
    blocks = max(1, -(-length // positions))
    programs = max(1, heads * -(-rows // block_rows))
    parts = min(-(-PER_PROCESSOR * processors // programs), MOST_PARTS, blocks)
    warps = WARPS if 1 < rows <= 16 else WARPS_FOR_MORE
    return Parts(block_rows, positions, -(-blocks // -(-blocks // parts)), warps)


def few_query_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See `ops.few_query_attention.few_query_attention`. `ConfigError` for operands that are not of 16 bits."""
    if query.dtype not in DTYPES:
        passed = f"attention in {query.dtype} by the Triton kernel"
        raise ConfigError(explain(passed, "bf16 or fp16", "Use 'reference'"))
    query, key, value = (part if part.stride(3) == 1 else part.contiguous() for part in (query, key, value))
    (batch, heads, queries, width), (shared, length), wide = query.shape, key.shape[1:3], value.shape[3]
    out = query.new_empty((batch, queries, heads, wide)).transpose(1, 2)
    if not out.numel():
        return out
    plan = cut(batch * shared, heads // shared * queries, length, max(width, wide), _processors(query.device))
    parts, marks = (
        (out, out)
        if plan.parts == 1
        else (query.new_empty((out.numel() // wide, plan.parts, last), dtype=torch.float32) for last in (wide, 2))
    )
    with on_device(query.device):
        _launch(plan, (query, key, value), mask, scale * math.log2(math.e), out, parts, marks)
        if plan.parts > 1:
            combine_kernel[(out.numel() // wide, triton.cdiv(wide, COMBINED))](
                parts, marks, out, heads, queries, *out.stride()[:3],
                DV=wide, SPLITS=plan.parts, BLOCK_S=triton.next_power_of_2(plan.parts), BLOCK_DV=COMBINED,
                num_warps=WARPS, **early(),
            )  # fmt: skip
    return out


def _launch(
    plan: Parts,
    operands: tuple[Tensor, Tensor, Tensor],
    mask: Tensor | None,
    factor: float,
    out: Tensor,
    parts: Tensor,
    marks: Tensor,
) -> None:
    """The parts of all rows into `parts` and `marks`; where there is one part, the result into `out`."""
    query, key, value = operands
    (batch, heads, queries, width), (shared, length) = query.shape, key.shape[1:3]
    kind, seen, steps = _mask(mask, (batch, heads, queries, length))
    given = (query, key, value, query if seen is None else seen, out, parts, marks, factor, shared, length)
    (qb, qh, qq, _), (ob, oh, oq, _), (mb, mh, mq, ml) = query.stride(), out.stride(), steps
    between = (*key.stride()[:3], *value.stride()[:3])
    sizes = {
        "MASK": kind, "D": width, "DV": value.shape[3], "SPLIT": plan.parts > 1, "BLOCK_L": plan.positions,
        "BLOCK_D": _padded(width), "BLOCK_DV": _padded(value.shape[3]), "num_warps": plan.warps, **early(),
    }  # fmt: skip
    if heads == shared and queries == 1:
        one_row_kernel[(batch * shared, plan.parts)](*given, qb, qh, *between, mb, mh, ml, ob, oh, **sizes)
        return
    group = heads // shared
    rows_kernel[(batch * shared, plan.parts, triton.cdiv(group * queries, plan.rows))](
        *given, qb, qh, qq, *between, mb, mh, mq, ml, ob, oh, oq,
        ALIKE=mh == 0 and (mq == 0 or queries == 1), GROUP=group, QUERIES=queries, BLOCK_R=plan.rows, **sizes,
    )  # fmt: skip


def _mask(mask: Tensor | None, shape: tuple[int, ...]) -> tuple[str, Tensor | None, tuple[int, ...]]:
    """Its kind, its memory as the kernel reads it, and its strides, 0 where it is the same."""
    if mask is None:
        return "none", None, (0, 0, 0, 0)
    whole = mask.expand(shape)
    if mask.dtype is torch.bool:
        return "bool", whole.view(torch.uint8), whole.stride()
    return "added", whole, whole.stride()


def _padded(width: int) -> int:
    """Values of a head in a tile, which has a power of two, and 16 at least for the matrix units."""
    size: int = triton.next_power_of_2(max(16, width))
    return size


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type == "cpu":  # kernels are interpreted: few, so that some programs have parts and some several blocks
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
