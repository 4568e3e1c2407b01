"""How many values of a tensor are infinite or NaN, in plain PyTorch, for any device and type: in pieces."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 1 << 22
"""Values that are looked at together, in up to 12 bytes each beside them: a step may leave no more room than that."""


def non_finite(x: Tensor) -> Tensor:
    """See `ops.non_finite.non_finite`."""
    counts = [_of_piece(piece) for piece in _pieces(x)]
    return sum(counts[1:], counts[0]).float()


def _of_piece(piece: Tensor) -> Tensor:
    """int64 []. The difference is zero for what is finite, and NaN for the rest."""
    if piece.itemsize == 1:  # PyTorch has none of numbers in 8 bits
        piece = piece.float()
    return (piece - piece).count_nonzero()


def _pieces(values: Tensor) -> tuple[Tensor, ...]:
    """All values, in views of so many that what is computed of one takes little memory: scores may be most of it."""
    if values.numel() <= PIECE:
        return (values,)
    longest = max(range(values.dim()), key=lambda dim: values.shape[dim])
    return torch.split(values, max(1, PIECE * values.shape[longest] // values.numel()), longest)
