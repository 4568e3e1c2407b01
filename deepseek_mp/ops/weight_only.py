"""A linear layer whose weight is kept in 8 bits, `weight_only_linear`: inference that reads half of BF16's bytes.

A model that generates one token at a time reads every weight once for it and multiplies little, so that its time is
that of the bytes. Here the weight is int8 or FP8 (E4M3) with a scale for each output channel; it is widened where it is
multiplied, in a program's registers. Activations stay in 16 bits, sums are fp32. Both kinds of 8 bits are exact in bf16
and fp16, so that a product loses nothing; what is lost was lost when the weight was rounded. On NVIDIA from sm_90 a
single row in bf16 is multiplied in fp16, eight products to a sum, which loses less than rounding the output to bf16
does (`triton.paired_kernel`).

    implementation   x                  weight      where
    reference        fp32, bf16, fp16   int8, fp8   any device; slow: the weight is widened in memory
    native           bf16               int8        CPUs, as far as PyTorch has the product; K in whole 32s
    triton           bf16, fp16         int8, fp8   GPUs of NVIDIA and AMD

It is an opaque op, the same in eager and in compiled code; it has no gradient. `benchmarks/weight_only.py` times it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deepseek_mp.errors import ConfigError, ShapeError, explain
from deepseek_mp.ops.choose import kernel_runs, weight_only_of
from deepseek_mp.ops.native.weight_only import WIDTH as NATIVE_WIDTH

FORMATS: Mapping[str, tuple[torch.dtype, float]] = MappingProxyType(
    {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
)
"""By name: how a weight is stored, and its largest value. Of int8, -128 is not used."""

_library = torch.library.Library("deepseek_mp", "FRAGMENT")


def quantised_weight(weight: Tensor, format: str, name: str = "a weight") -> tuple[Tensor, Tensor]:
    """A weight in 8 bits, symmetric around zero, with a scale for each row: weight is about q * scale[:, None].

    The scale is amax / 127 (int8) or amax / 448 (fp8), amax the largest magnitude of the row, in fp32; q is the value
    nearest to weight / scale, ties to even. A row of zeros has zeros and the scale 1.

    Args:
        weight: [N, K], floating.
        format: 'int8' or 'fp8' (E4M3).
        name: what the message calls it.

    Returns:
        q [N, K], contiguous, and scale [N] in fp32, on the device of the weight.

    Raises:
        ConfigError: a format that is none of these, or values that are not finite.
        ShapeError: no matrix.
    """
    if format not in FORMATS:
        raise ConfigError(explain(f"weights in {format!r}", ", ".join(map(repr, FORMATS)), "Use one of these"))
    if weight.dim() != 2:
        raise ShapeError(explain(f"{name} {list(weight.shape)} for 8 bits", "[N, K]", "Leave it in 16 bits"))
    wide = weight.detach().float()
    if not bool(wide.isfinite().all()):
        raise ConfigError(explain(f"{name} with values that are not finite", "finite weights", "Leave it as it is"))
    scale = scales_of(wide, format)
    return rounded_by(wide, scale, format), scale


def scales_of(wide: Tensor, format: str) -> Tensor:
    """The scale [N] of each row of fp32 values [N, K], as `quantised_weight` says; nothing is checked."""
    amax = wide.abs().amax(1) if wide.shape[1] else wide.new_zeros(wide.shape[0])
    scale = amax / FORMATS[format][1]
    return torch.where(scale == 0, torch.ones_like(scale), scale)  # NaN and infinity stay what they are


def rounded_by(wide: Tensor, scale: Tensor, format: str) -> Tensor:
    """q [N, K], the nearest values to wide / scale[:, None] in the format's range; nothing is checked."""
    dtype, top = FORMATS[format]
    q = (wide / scale[:, None]).clamp_(-top, top)
    return (q.round_() if dtype is torch.int8 else q).to(dtype).contiguous()


def weight_only_linear(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, *, implementation: str) -> Tensor:
    """x times the transposed weight: out[m, n] = (sum over k of x[m, k] * q[n, k]) * scale[n] + bias[n].

    Sums, scale and bias are in fp32, rounded once to the dtype of x; native rounds the sum too. Of one row see above.

    Args:
        x: [M, K] in fp32 (reference only), bf16 or fp16 (see above).
        q: [N, K] in int8 or float8_e4m3fn, contiguous.
        scale: [N] in fp32.
        bias: [N], floating, or None.
        implementation: reference, native or triton.

    Returns:
        [M, N] in the dtype of x.

    Raises:
        ShapeError: shapes that do not belong together.
        ConfigError: another dtype, or an implementation that does not take these operands.
    """
    out: Tensor = torch.ops.deepseek_mp.weight_only_linear(x, q, scale, bias, implementation)
    return out


def fastest(device: torch.device, dtype: torch.dtype, format: str, width: int) -> str | None:
    """The implementation for activations of a dtype and rows of `width` weights; None: only the slow reference."""
    if device.type == "cpu":
        native = format == "int8" and dtype is torch.bfloat16 and width % NATIVE_WIDTH == 0
        return "native" if native and _native_is_right() else None
    narrow = dtype in (torch.bfloat16, torch.float16)
    return "triton" if narrow and _kernels_run(device, dtype, format) else None


@cache
def _kernels_run(device: torch.device, dtype: torch.dtype, format: str) -> bool:
    def once() -> None:
        q, scale = quantised_weight(torch.ones(16, 32, device=device), format)
        for count in (1, 2):
            weight_only_of("triton")(torch.ones(count, 32, device=device, dtype=dtype), q, scale, None)

    return kernel_runs(device, f"linear layers with weights in {format}", once)


@cache
def _native_is_right() -> bool:
    """Whether PyTorch has its product for this CPU, and it gives what it should."""
    if not hasattr(torch.ops.aten, "_weight_int8pack_mm"):
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 96, generator=generator, device="cpu").to(torch.bfloat16)
    q, scale = quantised_weight(torch.randn(40, 96, generator=generator, device="cpu"), "int8")
    try:
        found = weight_only_of("native")(x, q, scale, None)
    except (RuntimeError, NotImplementedError):
        return False
    return torch.allclose(found.float(), weight_only_of("reference")(x.float(), q, scale, None), rtol=2e-2, atol=2e-2)


def _run(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, implementation: str) -> Tensor:
    _check(x, q, scale, bias)
    return weight_only_of(implementation)(x, q, scale, bias)


def _shapes(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None, _implementation: str) -> Tensor:
    _check(x, q, scale, bias)
    return x.new_empty((x.shape[0], q.shape[0]))


def _check(x: Tensor, q: Tensor, scale: Tensor, bias: Tensor | None) -> None:
    given = [x.shape, q.shape, scale.shape, *([] if bias is None else [bias.shape])]
    fits = x.dim() == 2 and q.dim() == 2 and x.shape[1] == q.shape[1] and q.is_contiguous()
    if not fits or any(list(part) != [q.shape[0]] for part in given[2:]):
        passed = f"a linear layer of {' and '.join(str(list(shape)) for shape in given)}"
        allowed = "x [M, K], q [N, K] contiguous, scale [N] and bias [N]"
        raise ShapeError(explain(passed, allowed, "Flatten what is before the features, and make q contiguous"))
    kept = [*(dtype for dtype, _ in FORMATS.values()), torch.float8_e4m3fnuz]  # the last from files (`fp8_kinds`)
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or q.dtype not in kept:
        passed = f"x in {x.dtype} with weights in {q.dtype}"
        allowed = "fp32, bf16 or fp16 with int8, float8_e4m3fn or float8_e4m3fnuz"
        raise ConfigError(explain(passed, allowed, "Quantise with quantised_weight"))
    if scale.dtype is not torch.float32:
        raise ConfigError(explain(f"scales in {scale.dtype}", "fp32", "Pass those that quantised_weight gave"))


_library.define(
    "weight_only_linear(Tensor x, Tensor q, Tensor scale, Tensor? bias, str implementation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("weight_only_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("deepseek_mp::weight_only_linear", _shapes, lib=_library)


@register_flop_formula(torch.ops.deepseek_mp.weight_only_linear)
def _operations(x: Sequence[int], q: Sequence[int], *_how: Any, **_: Any) -> int:
    """Those of the linear layer: a multiplication and an addition for each weight and row."""
    return 2 * x[0] * x[1] * q[0]
