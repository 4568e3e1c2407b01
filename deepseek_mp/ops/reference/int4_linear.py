"""`int4_linear` in plain PyTorch: the weight is widened to fp32 in memory, for any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MIDDLE = 8
"""The code of a group's zero."""


def packed(codes: Tensor) -> Tensor:
    """Codes from 0 to 15, uint8 [N, groups, group], as bytes [N, K / 2]: halves of a group in low and high nibbles."""
    low, high = codes.chunk(2, dim=2)
    return (low | (high << 4)).flatten(1).contiguous()


def unpacked(q: Tensor, groups: int) -> Tensor:
    """What `packed` was given."""
    bytes_ = q.view(len(q), groups, -1)
    return torch.cat([bytes_ & 15, bytes_ >> 4], dim=2)


def widened(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The weight [N, K] in fp32 that codes [N, K / 2], scale and zero [K / group, N] stand for."""
    return values_of(unpacked(q, len(scale)).float() - MIDDLE, scale.t(), zero.t())


def values_of(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The same of codes less 8, fp32 [N, groups, group], beside scale and zero [N, groups]."""
    return (codes * scale.float()[:, :, None] + zero.float()[:, :, None]).flatten(1)


@torch.no_grad()
def int4_linear(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """See `ops.int4_linear.int4_linear`."""
    assert zero is not None, "checked by the op"
    out = F.linear(x.float(), widened(q, scale, zero))
    return (out if bias is None else out.add_(bias)).to(x.dtype)
