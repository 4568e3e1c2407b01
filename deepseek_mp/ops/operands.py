"""The operands that a matrix is quantised to: what can be, in which way, and the shapes that come out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_mp.errors import FormatError, ShapeError, explain
from deepseek_mp.ops.cast import FP8
from deepseek_mp.ops.dtypes import torch_dtype
from deepseek_mp.ops.layouts import check_width, padded_rows, scale_shape

Operands = tuple[Tensor, Tensor, Tensor, Tensor]
"""Values, their scales, the transposed values, their scales."""


class Cast(NamedTuple):
    """How a matrix is quantised; see `ops.schema.quantise`."""

    format: str
    granularity: str
    power_of_two: bool
    rows: bool
    columns: bool


def cast_of_value(cast: Cast, format: str | None) -> Cast:
    """How f(x) * up is quantised beside its gradients: transposed, scaled as they are; not at all without a format."""
    return cast._replace(format=format or cast.format, rows=False, columns=format is not None)


def empty_operands(x: Tensor, cast: Cast) -> Operands:
    """Memory for the operands of x [M, K], nothing written yet; [0] for what is not asked for."""
    count, width = x.shape
    check_width(width, cast.granularity)
    padded, dtype = padded_rows(count, cast.granularity), torch_dtype(cast.format)

    def operand(wanted: bool, outer: int, contraction: int) -> tuple[Tensor, Tensor]:
        sizes = ((outer, contraction), scale_shape(cast.granularity, outer, contraction)) if wanted else ((0,), (0,))
        return x.new_empty(sizes[0], dtype=dtype), x.new_empty(sizes[1], dtype=torch.float32)

    return *operand(cast.rows, padded, width), *operand(cast.columns, width, padded)


def check_matrix(x: Tensor, format: str, granularity: str) -> None:
    """Kernels go by the addresses of a contiguous matrix, and would read another one wrongly without a word.

    Raises:
        ShapeError: x is no contiguous matrix, or its width does not consist of whole groups.
        FormatError: the format is not one of FP8.
    """
    if x.dim() != 2 or not x.is_contiguous():
        passed = f"a tensor of shape {list(x.shape)} and strides {list(x.stride())} to quantise"
        raise ShapeError(explain(passed, "contiguous matrices [M, K]", "Flatten it to rows and call contiguous()"))
    if format not in FP8:
        raise FormatError(explain(f"format {format!r} to quantise to", ", ".join(FP8), "Use one of these"))
    check_width(x.shape[1], granularity)


def check_seed(seed: Tensor, x: Tensor) -> None:
    """`ShapeError` if the seed of a cast of x is no int64 scalar where x is."""
    if seed.shape or seed.dtype != torch.int64 or seed.device != x.device:
        passed = f"a seed of shape {list(seed.shape)} and type {seed.dtype} on {seed.device}"
        change = "Draw it by torch.randint(2**63 - 1, (), device=x.device)"
        raise ShapeError(explain(passed, f"int64 of shape [] on {x.device}, where the tensor is", change))


def check_magnitude(name: str, number: Tensor, x: Tensor) -> None:
    """`ShapeError` if a magnitude that goes with x is no fp32 scalar where x is."""
    if number.shape or number.dtype != torch.float32 or number.device != x.device:
        passed = f"{name} of shape {list(number.shape)} and type {number.dtype} on {number.device}"
        change = "Apply the plan again if the model was moved to another device since"
        raise ShapeError(explain(passed, f"fp32 of shape [] on {x.device}, where the tensor is", change))
