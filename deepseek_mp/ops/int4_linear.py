"""A linear layer whose weight is kept in 4 bits, `int4_linear`: inference that reads a quarter of BF16's bytes.

A weight is rounded to one of 16 values spread evenly over the range of its group, 128 weights that follow each other in
a row (64 or 32 where rows have no whole 128s): it is about (code - 8) * scale + zero, with scale and zero of the group
in BF16, 4.25 bits a weight together. It is widened where it is multiplied. Activations stay in 16 bits, sums are fp32.

    implementation   x                  where
    reference        fp32, bf16, fp16   any device; slow: the weight is widened in memory
    triton           bf16, fp16         GPUs of NVIDIA and AMD
    native           bf16               PyTorch's product: CPUs (N in whole 16s), NVIDIA (N in whole 8s)

`native` reads the weight in an order of its own, which `prepared` makes and `unprepared` takes back; it is for few rows
of x, whereas `triton` has tiles for many too, so it comes first. The order of the others: a group's half of K / 2 bytes
has its first weights in the low nibbles, its second half in the high ones, so that x is read along its rows.

It is an opaque op, the same in eager and in compiled code; it has no gradient. Times have not been measured on a GPU
yet; `benchmarks/weight_only.py` does it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deepseek_mp.errors import ConfigError, ShapeError, explain
from deepseek_mp.ops.choose import int4_linear_of, kernel_runs
from deepseek_mp.ops.native import int4_linear as native
from deepseek_mp.ops.reference.int4_linear import packed

log = logging.getLogger("deepseek_mp")

GROUPS = (128, 64, 32)
"""Weights of a group; the first one that divides a row is taken."""
MIDDLE, LARGEST = 8, 15
"""The code that stands for a group's zero, and the largest one."""

_library = torch.library.Library("deepseek_mp", "FRAGMENT")


def group_of(width: int) -> int | None:
    """Weights of a group in rows of `width`; None if they do not consist of whole groups."""
    return next((group for group in GROUPS if width and width % group == 0), None)


def int4_weight(
    weight: Tensor, name: str = "a weight", *, factor: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in 4 bits with a scale and a zero for each group of a row: (code - 8) * scale + zero.

    With the least and the largest value of a group, scale = (largest - least) / 15 and zero = least + 8 * scale, both
    rounded to BF16; code is the nearest to (weight - zero) / scale + 8 of 0 to 15, ties to even. A group of one value
    has that value, as BF16 has it, as its zero, and the scale 1.

    Args:
        weight: [N, K], floating.
        name: what the message calls it.
        factor: [N, K / group] in fp32, positive: what scales are multiplied by, as training learned them; the zeros
            stay. None: 1.

    Returns:
        codes, two a byte (uint8 [N, K / 2], as above), scale and zero [K / group, N] in BF16.

    Raises:
        ConfigError: values that are not finite, or beyond BF16.
        ShapeError: no matrix of whole groups.
    """
    group = group_of(weight.shape[1]) if weight.dim() == 2 else None
    if group is None:
        allowed = f"[N, K] with K a multiple of {GROUPS[-1]}"
        raise ShapeError(explain(f"{name} {list(weight.shape)} for 4 bits", allowed, "Leave it in 16 bits"))
    wide = weight.detach().float().view(len(weight), -1, group)
    if not bool(wide.isfinite().all()):
        raise ConfigError(explain(f"{name} with values that are not finite", "finite weights", "Leave it as it is"))
    scale, zero = grid_of(wide)
    scale = scale if factor is None else (scale.float() * factor).to(scale.dtype)
    if not bool((scale.isfinite() & zero.isfinite()).all()):
        raise ConfigError(explain(f"{name} with values beyond BF16", "smaller weights", "Leave it as it is"))
    q = packed((codes_by(wide, scale, zero) + MIDDLE).to(torch.uint8))
    return q, scale.t().contiguous(), zero.t().contiguous()


def grid_of(wide: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero [N, groups] in BF16 of fp32 values [N, groups, group], as `int4_weight` says; nothing is checked.

    A group with an infinity or NaN has a scale or a zero that is none either.
    """
    least, largest = wide.aminmax(dim=2)
    scale = (largest / LARGEST - least / LARGEST).to(torch.bfloat16)
    zero = (least + MIDDLE * scale.float()).to(torch.bfloat16)
    return torch.where(scale > 0, scale, torch.ones_like(scale)), zero


def codes_by(wide: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes less 8, fp32 [N, groups, group] from -8 to 7, of values beside a grid; nothing is checked."""
    ratio = (wide - zero.float()[:, :, None]) / scale.float()[:, :, None]
    return ratio.add_(MIDDLE).round_().clamp_(0, LARGEST).sub_(MIDDLE)


def int4_linear(
    x: Tensor, q: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, *, implementation: str
) -> Tensor:
    """x times the transposed weight that `int4_weight` gave, plus a bias.

    Args:
        x: [M, K] in fp32 (reference only), bf16 or fp16 (see above).
        q, scale, zero: as `int4_weight` gives them, or some channels of it as a view; for native as
            `native.int4_linear.prepared` does.
        bias: [N], floating, or None.
        implementation: reference, native or triton.

    Returns:
        [M, N] in the dtype of x. Triton's tiles and native round the widened weight to that dtype, and native the sum
        before the bias.

    Raises:
        ShapeError: shapes that do not belong together.
        ConfigError: another dtype, or an implementation that does not take these operands.
    """
    out: Tensor = torch.ops.deepseek_mp.int4_linear(x, q, scale, zero, bias, implementation)
    return out


def fastest(device: torch.device, dtype: torch.dtype, channels: int, width: int) -> str | None:
    """The implementation for a layer; None: only the slow reference."""
    group = group_of(width)
    if group is None or dtype not in (torch.bfloat16, torch.float16):
        return None
    if _kernels_run(device, dtype):
        return "triton"
    return "native" if dtype is torch.bfloat16 and has_native(device, channels, group) else None


def has_native(device: torch.device, channels: int, group: int) -> bool:
    """Whether the library has a product there for BF16, and it is right."""
    multiple = native.multiple_of_channels(device)
    return multiple is not None and channels % multiple == 0 and _native_is_right(device, group)


@cache
def _kernels_run(device: torch.device, dtype: torch.dtype) -> bool:
    def once() -> None:
        q, scale, zero = (part.to(device) for part in int4_weight(torch.ones(16, 128)))
        for count in (1, 2, 17, 65):
            int4_linear_of("triton")(torch.ones(count, 128, device=device, dtype=dtype), q, scale, zero, None)

    return kernel_runs(device, "linear layers with weights in 4 bits", once)


@cache
def _native_is_right(device: torch.device, group: int) -> bool:
    """Whether PyTorch has its product for this device and groups, and it gives what it should."""
    generator = torch.Generator().manual_seed(0)
    for groups in (2, 5):
        weight = torch.randn(32, groups * group, generator=generator, device="cpu")
        q, scale, zero = (part.to(device) for part in int4_weight(weight))
        x = torch.randn(3, groups * group, generator=generator, device="cpu").to(device, torch.bfloat16)
        expected = int4_linear_of("reference")(x.float(), q, scale, zero, None)
        try:
            found = int4_linear_of("native")(x, *prepared(q, scale, zero, implementation="native"), None)
        except (RuntimeError, NotImplementedError, AttributeError) as error:
            log.debug("weights in 4 bits: no product of PyTorch's on %s: %s", device, error)
            return False
        if not torch.allclose(found.float(), expected, rtol=2e-2, atol=5e-2):
            return False
    return True


def prepared(q: Tensor, scale: Tensor, zero: Tensor, *, implementation: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """What `int4_weight` gave, as the implementation reads it."""
    if implementation != "native":
        return q, scale, zero
    return native.prepared(q, scale, zero)


def unprepared(q: Tensor, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """What `prepared` was given, bit for bit."""
    return native.unprepared(q, scale) if zero is None else (q, scale, zero)


def _run(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, implementation: str) -> Tensor:
    _check(x, q, scale, zero, bias, implementation)
    return int4_linear_of(implementation)(x, q, scale, zero, bias)


def _shapes(
    x: Tensor, q: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, implementation: str
) -> Tensor:
    _check(x, q, scale, zero, bias, implementation)
    return x.new_empty((x.shape[0], scale.shape[1]))


def _check(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, implementation: str) -> None:
    given = [x, q, scale, *([] if zero is None else [zero]), *([] if bias is None else [bias])]
    fits = x.dim() == 2 and scale.dim() == (3 if zero is None else 2) and q.is_contiguous()
    if fits:
        groups, channels = scale.shape[:2]
        fits = groups > 0 and x.shape[1] // groups in GROUPS and x.shape[1] % groups == 0
        fits = fits and q.numel() * q.element_size() * 2 == channels * x.shape[1]
        fits = fits and (
            scale.is_contiguous() if zero is None else zero.shape == scale.shape and _in_lines(scale, zero)
        )
        fits = fits and (bias is None or list(bias.shape) == [channels])
    if not fits:
        passed = f"a linear layer in 4 bits of {' and '.join(str(list(part.shape)) for part in given)}"
        allowed = "x [M, K], q [N, K / 2], scale and zero [K / group, N], bias [N], contiguous but for lines"
        raise ShapeError(explain(passed, allowed, "Pass what int4_weight gave, and flatten x"))
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or scale.dtype is not torch.bfloat16:
        passed = f"x in {x.dtype} with scales in {scale.dtype}"
        raise ConfigError(explain(passed, "fp32, bf16 or fp16 with bf16", "Pass what int4_weight gave"))
    if (zero is None) != (implementation == "native"):
        passed = f"a weight in 4 bits that was prepared for another implementation than {implementation!r}"
        raise ConfigError(explain(passed, "what prepared(..., implementation=...) gave", "Prepare it for this one"))


def _in_lines(scale: Tensor, zero: Tensor) -> bool:
    """Whether both are contiguous, or the same part of the channels of two that are."""
    return (scale.stride(1) == zero.stride(1) == 1 or scale.shape[1] == 1) and (
        scale.stride(0) == zero.stride(0) or len(scale) == 1
    )


_library.define(
    "int4_linear(Tensor x, Tensor q, Tensor scale, Tensor? zero, Tensor? bias, str implementation) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("int4_linear", _run, "CompositeExplicitAutograd")
torch.library.register_fake("deepseek_mp::int4_linear", _shapes, lib=_library)


@register_flop_formula(torch.ops.deepseek_mp.int4_linear)
def _operations(x: Sequence[int], _q: Sequence[int], scale: Sequence[int], *_how: Any, **_: Any) -> int:
    """Those of the linear layer: a multiplication and an addition for each weight and row."""
    return 2 * x[0] * x[1] * scale[1]
