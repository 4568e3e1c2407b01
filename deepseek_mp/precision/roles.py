"""The three matrix products of a unit, and which operands each of them multiplies.

For a linear layer with input X [M, K], weight W [N, K] and output Y [M, N]:

    fprop   Y  = X  @ W.T     operands: input, weight
    dgrad   dX = dY @ W       operands: grad_output, weight
    wgrad   dW = dY.T @ X     operands: grad_output, input

A convolution is the same three products over unfolded windows. Each tensor is an operand of two
products, and may have a different format in each.

Every operand is seen as a matrix [outer, contraction]: the extent that the product sums over comes last.
So the product of operands A [a, c] and B [b, c] is A @ B.T, and

    fprop   X    [M, K]   times   W    [N, K]
    dgrad   dY   [M, N]   times   W.T  [K, N]
    wgrad   dY.T [N, M]   times   X.T  [K, M]

A granularity counts its rows along `outer` and its columns along `contraction`. The two products that read
a tensor sum over different extents of it, so each needs the tensor in a layout of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType


class Role(StrEnum):
    """One of a unit's three products."""

    FPROP = "fprop"
    DGRAD = "dgrad"
    WGRAD = "wgrad"


class Operand(StrEnum):
    """A tensor that a product reads."""

    INPUT = "input"
    WEIGHT = "weight"
    GRAD_OUTPUT = "grad_output"


OPERANDS: Mapping[Role, tuple[Operand, Operand]] = MappingProxyType(
    {
        Role.FPROP: (Operand.INPUT, Operand.WEIGHT),
        Role.DGRAD: (Operand.GRAD_OUTPUT, Operand.WEIGHT),
        Role.WGRAD: (Operand.GRAD_OUTPUT, Operand.INPUT),
    }
)
"""The left and right operand of each product."""
