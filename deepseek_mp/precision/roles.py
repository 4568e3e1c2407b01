"""The three matrix products of a unit, and which operands each of them multiplies.

For a linear layer with input X [M, K], weight W [N, K] and output Y [M, N]:

    fprop   Y  = X  @ W.T     operands: input, weight
    dgrad   dX = dY @ W       operands: grad_output, weight
    wgrad   dW = dY.T @ X     operands: grad_output, input

A convolution is the same three products over unfolded windows. Each tensor is an operand of two
products, and may have a different format in each.
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
