"""The ops of low-precision products, declared once: `quantise`, `quantise_delayed` and `product`.

Casts that compute their tensor themselves are in `ops.schema_made`.

Each is one opaque op of the library `deepseek_mp`, the same in eager and in compiled code. The name of
the implementation is an argument: it is chosen once, when a plan is applied (`ops.choose`), is visible
in every graph, and nothing at run time replaces it by another.

    implementation   quantise, quantise_delayed   product   where
    reference        yes                          yes       any device; exact to the last bit, slow: the emulation
    triton           yes                          yes       GPUs of NVIDIA and AMD with FP8
    native           -                            yes       `torch._scaled_mm`, as far as the device's libraries go

The ops have no gradient of their own. `nn.functional` calls them inside an autograd function, whose
forward is not recorded. Elsewhere, on tensors that require a gradient, they give results that seem to
require one; going backward through them warns, and no gradient arrives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek_mp.errors import ShapeError, explain
from deepseek_mp.ops.choose import product_of, quantise_delayed_of, quantise_of
from deepseek_mp.ops.layouts import alignment, padded_rows
from deepseek_mp.ops.operands import Cast, Operands, check_magnitude, check_matrix, check_seed, empty_operands

__all__ = ["alignment", "padded_rows", "product", "quantise", "quantise_delayed"]

_library = torch.library.Library("deepseek_mp", "DEF")
_library.define(
    "quantise(Tensor x, str format, str granularity, bool power_of_two, bool rows, bool columns, str implementation, *,"
    " Tensor? seed=None) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "quantise_delayed(Tensor x, Tensor top, Tensor(a!) amax, str format, bool power_of_two, bool rows, bool columns, *,"
    " str implementation) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "product(Tensor left, Tensor left_scale, Tensor right, Tensor right_scale, *, str left_granularity,"
    " str right_granularity, Tensor? bias, ScalarType dtype, str implementation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def quantise(
    x: Tensor,
    format: str,
    granularity: str,
    power_of_two: bool,
    rows: bool,
    columns: bool,
    implementation: str,
    *,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A matrix in FP8, as it is and transposed, with the scales of each (`ops.layouts`).

    The scale of a group follows from the largest magnitude in it: with top = max(amax, fmax * 2**-126),

        scale = top * (1 / fmax), rounded up to a power of two on request;    inverse = fmax * (1 / top)
        q = the FP8 value nearest to x * inverse, ties to even

    in fp32, where top and fmax are quartered for the inverse: 1 / top may be subnormal. So a group of zeros gives
    zeros, and the inverse of a finite scale is finite. Infinities and NaN become NaN and are never clipped. In a group
    that spans rows (tensor, 128x128) they take no part in the scale, so other values stay as they are. A group of one
    row (row, 1x128, 1x32) becomes NaN as a whole, its scale too: a product adds up the row, so no result differs.

    With a seed, q is one of the two FP8 values next to x * inverse: the one of larger magnitude with a probability
    equal to the fraction of the way to it, as far as multiples of 2**-24 can tell. So the mean over seeds is
    x * inverse itself. What FP8 holds stays as it is; infinities and NaN become NaN as ever. A random number belongs to
    a seed and a place in the matrix, and is the same for both layouts, all implementations and all devices: where
    both layouts have one scale, their values are equal too.

    Args:
        x: [M, K] in fp32, bf16 or fp16, contiguous. K is a multiple of `alignment(granularity)`.
        format: the FP8 format, by its name in `precision.FORMATS`.
        granularity: which values share a scale: tensor, row, 1x32, 1x128 or 128x128.
        power_of_two: scales are powers of two.
        rows: make q [P, K]; P is M rounded up to the alignment, and the added rows are zeros.
        columns: make the transposed one [K, P], with scales of its own groups.
        implementation: reference or triton.
        seed: int64 [] on the device of x, what random numbers follow from; None: round to the nearest. Drawn by
            `torch.randint` it follows from PyTorch's generator, and the host does not wait for it.

    Returns:
        q, its scales, the transposed q, its scales; empty tensors [0] for what was not asked for.

    Raises:
        ShapeError: K does not consist of whole groups, x is no contiguous matrix, or the seed no such scalar.
        FormatError: the format is not one of FP8.
    """
    made: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.deepseek_mp.quantise(
        x, format, granularity, power_of_two, rows, columns, implementation, seed=seed
    )
    return made


def quantise_delayed(
    x: Tensor,
    top: Tensor,
    amax: Tensor,
    format: str,
    power_of_two: bool,
    rows: bool,
    columns: bool,
    *,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantise` with one scale for the tensor, taken from a magnitude that is known beforehand.

    So one pass over x is enough. The scale follows from `top` as that of `quantise` follows from the largest
    magnitude of x: where the two are equal, so are the results, bit for bit. Values beyond `top` become the largest
    value of the format, or the next ones below; infinities and NaN become NaN.

    Args:
        x: as for `quantise`, with a width that is a multiple of 16.
        top: fp32 [], the magnitude that the scale has to hold; 0: not known, then it is that of x.
        amax: fp32 [], raised to the largest finite magnitude of x if it is below.
        format, power_of_two, rows, columns: as for `quantise`.
        implementation: reference or triton.

    Returns:
        What `quantise` returns.

    Raises:
        ShapeError: x is no contiguous matrix of such a width, or `top` or `amax` no fp32 scalar on its device.
        FormatError: the format is not one of FP8.
    """
    made: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.deepseek_mp.quantise_delayed(
        x, top, amax, format, power_of_two, rows, columns, implementation=implementation
    )
    return made


def product(
    left: Tensor,
    left_scale: Tensor,
    right: Tensor,
    right_scale: Tensor,
    pair: tuple[str, str],
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    implementation: str,
) -> Tensor:
    """The product of two quantised operands: out[a, b] = sum over c of (left * scale)[a, c] * (right * scale)[b, c].

    Sums are fp32. Limited-precision accumulation ("fast accumulation") is never used: on 16384 positive
    numbers it loses a quarter of the sum on an H200.

    Args:
        left: [A, C] in FP8, right: [B, C] in FP8, with their scales as `quantise` stores them.
        pair: the granularities of the left and the right scales.
        bias: [B], added to every row, or None.
        dtype: of the result: bf16, fp16 or fp32.
        implementation: reference, triton or native.

    Returns:
        [A, B]; zeros (plus bias) where C = 0.
    """
    out: Tensor = torch.ops.deepseek_mp.product(
        left, left_scale, right, right_scale,
        left_granularity=pair[0], right_granularity=pair[1], bias=bias, dtype=dtype, implementation=implementation,
    )  # fmt: skip
    return out


def _quantise(x: Tensor, *how: Any, seed: Tensor | None = None) -> Operands:
    *settings, implementation = how
    cast = Cast(*settings)
    check_matrix(x, cast.format, cast.granularity)
    if seed is not None:
        check_seed(seed, x)
    return quantise_of(implementation)(x, cast, seed)


def _quantise_delayed(x: Tensor, top: Tensor, amax: Tensor, format: str, *how: Any, implementation: str) -> Operands:
    cast = Cast(format, "tensor", *how)
    check_matrix(x, format, "tensor")
    for name, number in (("top", top), ("amax", amax)):
        check_magnitude(name, number, x)
    return quantise_delayed_of(implementation)(x, top, amax, cast)


def _product(
    left: Tensor,
    left_scale: Tensor,
    right: Tensor,
    right_scale: Tensor,
    *,
    left_granularity: str,
    right_granularity: str,
    bias: Tensor | None,
    dtype: torch.dtype,
    implementation: str,
) -> Tensor:
    _check_product(left, right)
    run = product_of(implementation)
    return run(left, left_scale, right, right_scale, (left_granularity, right_granularity), bias, dtype)


def _quantise_shapes(x: Tensor, *how: Any, **_: Any) -> Operands:
    *settings, _implementation = how
    return empty_operands(x, Cast(*settings))


def _quantise_delayed_shapes(x: Tensor, _top: Tensor, _amax: Tensor, format: str, *how: Any, **_: Any) -> Operands:
    return empty_operands(x, Cast(format, "tensor", *how))


def _product_shapes(
    left: Tensor, _left_scale: Tensor, right: Tensor, _right_scale: Tensor, *, dtype: torch.dtype, **_: Any
) -> Tensor:
    _check_product(left, right)
    return left.new_empty((left.shape[0], right.shape[0]), dtype=dtype)


def _check_product(left: Tensor, right: Tensor) -> None:
    if left.shape[1] != right.shape[1]:
        passed = f"a product of operands {list(left.shape)} and {list(right.shape)}"
        raise ShapeError(explain(passed, "[A, C] and [B, C]", "Pass both with the extent that is summed over last"))


for _name, _run, _shapes in (
    ("quantise", _quantise, _quantise_shapes),
    ("quantise_delayed", _quantise_delayed, _quantise_delayed_shapes),
    ("product", _product, _product_shapes),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"deepseek_mp::{_name}", _shapes, lib=_library)
