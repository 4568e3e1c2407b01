"""Cases of attention of few queries, and what PyTorch gives for them in FP64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes, and the order in memory of keys and values: by head, by position, or a part of a longer cache."""

    batch: int = 1
    heads: int = 2
    shared: int = 2
    queries: int = 1
    keys: int = 300
    width: int = 64
    wide: int = 64
    order: str = "head"


CASES = {
    "one query": Case(),
    "batch": Case(batch=3, keys=130),
    "by position": Case(batch=2, order="position"),
    "part of a cache": Case(batch=2, keys=257, order="part"),
    "odd widths": Case(width=80, wide=40, keys=70),
    "one key": Case(keys=1),
    "queries": Case(queries=5, heads=3, shared=3),
    "groups": Case(heads=8, shared=2, keys=190),
    "groups and queries": Case(heads=6, shared=2, queries=3, keys=100, width=32, wide=64),
    "many rows": Case(heads=10, shared=1, queries=8, keys=90, width=32, wide=32),
}
MASKS = ("none", "tail", "rows", "heads", "added", "blind")


def operands(case: Case, dtype: torch.dtype, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value."""
    query = torch.randn(case.batch, case.queries, case.heads, case.width).transpose(1, 2)
    both = []
    for width in (case.width, case.wide):
        if case.order == "position":
            part = torch.randn(case.batch, case.keys, case.shared, width).to(device, dtype).transpose(1, 2)
        elif case.order == "part":
            whole = torch.randn(case.batch + 1, case.shared + 1, case.keys + 9, width + 16).to(device, dtype)
            part = whole[1:, 1:, 3 : 3 + case.keys, 16:]
        else:
            part = torch.randn(case.batch, case.shared, case.keys, width).to(device, dtype)
        both.append(part)
    return query.to(device, dtype), both[0], both[1]


def mask_of(kind: str, case: Case, dtype: torch.dtype, device: str | torch.device = "cpu") -> Tensor | None:
    """By name: what most caches need, one for each query or head, one that is added, and one whose last query sees
    nothing."""
    positions = torch.arange(case.keys)
    if kind == "tail":
        return (positions <= case.keys // 3)[None].to(device)
    if kind == "rows":
        last = case.keys - case.queries + torch.arange(case.queries)
        return (positions <= last[:, None])[None].to(device)
    if kind == "heads":
        seen = torch.rand(case.batch, case.heads, 1, case.keys) < 0.3
        seen[..., 0] = True
        return seen.to(device)
    if kind == "added":
        hidden = torch.rand(case.batch, 1, case.queries, case.keys) < 0.2
        hidden[..., 0] = False
        return torch.randn(hidden.shape).masked_fill(hidden, -torch.inf).to(device, dtype)
    if kind == "blind":
        return (torch.arange(case.queries) < case.queries - 1)[:, None].expand(-1, case.keys).to(device)
    return None


def least_mask(keys: int, device: str | torch.device = "cpu") -> Tensor:
    """Added to scores, it leaves nothing of them but no infinity."""
    return torch.full((keys,), torch.finfo(torch.float32).min, device=device)


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """PyTorch's attention in FP64, as a tensor on the CPU."""
    if mask is not None and mask.dtype is not torch.bool:
        mask = mask.double()
    wide = (query.double(), key.double(), value.double())
    return F.scaled_dot_product_attention(*wide, attn_mask=mask, scale=scale, enable_gqa=True).cpu()
