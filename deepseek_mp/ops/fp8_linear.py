"""A linear layer whose weight and activations are multiplied in FP8, `fp8_linear`: for inference, on matrix units.

The weight was rounded to E4M3 once, with a scale for each output channel (`ops.weight_only.quantised_weight`). Each row
of activations is rounded when it comes, with a scale of its own from its largest magnitude / 448: nothing is clipped,
and no row depends on another. Sums are fp32, without "fast accumulation".

    implementation   x                  where
    reference        fp32, bf16, fp16   any device; slow: both are taken back to fp32
    native           bf16, fp16         `torch._scaled_mm` with row scales; K and N in whole 16s

In eager code it is an opaque op, in which rows are cast by one launch of Triton (where there is Triton). In compiled
code `native` consists of PyTorch's own ops, so that the compiler makes the cast a part of what comes before it. There
rounding may differ by the last bit of a scale. The op has no gradient.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deepseek_mp.backends import capabilities
from deepseek_mp.errors import ConfigError, ShapeError, explain
from deepseek_mp.ops.choose import fp8_linear_of, why_not
from deepseek_mp.ops.layouts import alignment
from deepseek_mp.ops.native.fp8_linear import plain, plain_row_cast
from deepseek_mp.ops.weight_only import quantised_weight

log = logging.getLogger("deepseek_mp")

FORMAT = "fp8_e4m3"
"""What a device has to multiply; the kind of AMD's first devices with FP8 (fnuz) is another one."""
WIDTH = alignment("row")
"""Channels and widths are multiples of it: the libraries want rows of whole 16 bytes."""
_PAIR = ("row", "row")

_library = torch.library.Library("deepseek_mp", "FRAGMENT")


def fp8_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, *, implementation: str) -> Tensor:
    """Rows of x, rounded to FP8, times the transposed weight: out[m, n] = (x'[m] . q[n]) * scale[n] + bias[n].

    x' is a row as `ops.schema.quantise` rounds it by row: a row with an infinity or NaN gives NaN everywhere.

    Args:
        x: [M, K] in fp32 (reference only), bf16 or fp16.
        q: [N, K] in float8_e4m3fn, contiguous.
        scale: [N] in fp32.
        bias: [N], floating, or None.
        implementation: reference or native.

    Returns:
        [M, N] in the dtype of x.

    Raises:
        ShapeError: shapes that do not belong together, or that are no multiples of 16.
        ConfigError: another dtype.
    """
    if implementation == "native" and torch.compiler.is_compiling():
        return plain(x, q, scale, bias)
    out: Tensor = torch.ops.deepseek_mp.fp8_linear(x, q, scale, bias, implementation)
    return out


def rounded_rows(x: Tensor) -> Tensor:
    """x' of `fp8_linear`, what rows of x [M, K] stand for once they are rounded: [M, K] in fp32; it has no gradient."""
    with torch.no_grad():
        values, scale = plain_row_cast(x)
        return values.float() * scale


def fastest(device: torch.device, dtype: torch.dtype, channels: int, width: int) -> str | None:
    """The implementation for a layer; None: only the slow reference."""
    fits = channels % WIDTH == 0 and width % WIDTH == 0 and dtype in (torch.bfloat16, torch.float16)
    has = FORMAT in capabilities(device).matmul_formats and why_not("native", [_PAIR], capabilities(device)) is None
    return "native" if fits and has and _native_is_right(device, dtype) else None


@cache
def _native_is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the library has its product there for this dtype, and it gives what it should."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator, device="cpu")
    q, scale = (part.to(device) for part in quantised_weight(weight, "fp8"))
    bias = torch.randn(32, generator=generator, device="cpu").to(device, dtype)
    for rows in (1, 17):
        x = torch.randn(rows, 64, generator=generator, device="cpu").to(device, dtype)
        try:
            found = [fp8_linear_of("native")(x, q, scale, bias), plain(x, q, scale, bias)]
        except Exception as error:  # noqa: BLE001 - no such product, no compiler: the reference runs
            log.warning("linear layers in FP8: not on %s in %s: %s: %s", device, dtype, type(error).__name__, error)
            return False
        expected = fp8_linear_of("reference")(x.float(), q, scale, bias)
        if not all(torch.allclose(one.float(), expected, rtol=2e-2, atol=2e-2) for one in found):
            return False
    return True


def _run(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, implementation: str) -> Tensor:
    _check(x, q, scale, bias)
    return fp8_linear_of(implementation)(x, q, scale, bias)


def _shapes(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, _implementation: str) -> Tensor:
    _check(x, q, scale, bias)
    return x.new_empty((x.shape[0], q.shape[0]))


def _check(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    given = [x.shape, q.shape, scale.shape, *([] if bias is None else [bias.shape])]
    fits = x.dim() == 2 and q.dim() == 2 and x.shape[1] == q.shape[1] and q.is_contiguous()
    fits = fits and q.shape[0] % WIDTH == 0 and q.shape[1] % WIDTH == 0
    if not fits or any(list(part) != [q.shape[0]] for part in given[2:]):
        passed = f"an FP8 linear layer of {' and '.join(str(list(shape)) for shape in given)}"
        allowed = f"x [M, K], q [N, K] contiguous, scale [N] and bias [N], K and N multiples of {WIDTH}"
        raise ShapeError(explain(passed, allowed, "Leave such a layer in 16 bits"))
    dtypes = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and scale.dtype is torch.float32
    if not dtypes or q.dtype is not torch.float8_e4m3fn:
        passed = f"x in {x.dtype}, a weight in {q.dtype}, scales in {scale.dtype}"
        allowed = "fp32, bf16 or fp16, float8_e4m3fn, and fp32"
        raise ConfigError(explain(passed, allowed, "Quantise with quantised_weight"))


_library.define(
    "fp8_linear(Tensor x, Tensor q, Tensor scale, Tensor? bias, str implementation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("fp8_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("deepseek_mp::fp8_linear", _shapes, lib=_library)


@register_flop_formula(torch.ops.deepseek_mp.fp8_linear)
def _operations(x: Sequence[int], q: Sequence[int], *_how: Any, **_: Any) -> int:
    """Those of the linear layer: a multiplication and an addition for each weight and row."""
    return 2 * x[0] * x[1] * q[0]
