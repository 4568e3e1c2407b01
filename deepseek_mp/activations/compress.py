"""Saved tensors brought into a smaller form: FP8 by the casts of `ops`, or bits."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from deepseek_mp.activations.operations import NOT_POSITIVE_IF_STOPPED
from deepseek_mp.activations.stored import PIECE, Bits, Geometry, Rounded
from deepseek_mp.backends import capabilities
from deepseek_mp.ops.choose import choose
from deepseek_mp.ops.schema import padded_rows, quantise

FORMAT = "fp8_e4m3"
DEVICES = ("cpu", "cuda")
"""Types of devices whose FP8 tensors are known to work here; those of AMD are called cuda too."""
FLOATING = (torch.float32, torch.bfloat16, torch.float16)
"""What the casts take."""
REFERENCE_PIECE = 1 << 18
"""Values that a CPU casts at once, in its caches: a multiple of 128 rows, so that none are added in between."""
_SEEDS = 1 << 63


def is_dense(x: Tensor) -> bool:
    """Whether the values of a strided tensor fill a piece of memory without gaps, each once."""
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


@torch.no_grad()
def rounded(x: Tensor, group: int, seed: int | None) -> Rounded:
    """A dense tensor in FP8, by groups in the order of memory.

    Args:
        x: fp32, bf16 or fp16, of any shape, dense.
        group: values that share a scale, 32 or 128.
        seed: of stochastic rounding; None: to the nearest.
    """
    flat = _in_memory(x)
    whole = flat.numel() // group * group
    implementation = _implementation(x.device, f"1x{group}")
    # The reference computes random numbers in int64: whole tensors of them would take more memory than is saved.
    together = REFERENCE_PIECE if x.device.type == "cpu" else PIECE
    pieces = flat[:whole].split(together if implementation == "reference" else max(whole, 1))
    cast = [_cast(piece.view(-1, group), seed, number, implementation) for number, piece in enumerate(pieces)]
    values, scale = cast[0] if len(cast) == 1 else (torch.cat([q for q, _ in cast]), torch.cat([s for _, s in cast], 1))
    return Rounded(values, scale, flat[whole:].clone(), Geometry.of(x))


def _cast(rows: Tensor, seed: int | None, number: int, implementation: str) -> tuple[Tensor, Tensor]:
    """Rows [n, group] in FP8 and their scales [1, n], with rows added; `number` tells pieces of a tensor apart."""
    drawn = None if seed is None else (seed + number) % _SEEDS
    start = None if drawn is None else torch.full((), drawn, dtype=torch.int64, device=rows.device)
    granularity = f"1x{rows.shape[1]}"
    values, scale, _, _ = quantise(rows, FORMAT, granularity, False, True, False, implementation, seed=start)
    return values, scale


def rounded_bytes(count: int, group: int) -> int:
    """Bytes that `rounded` takes for so many values, nearly: rows are added up to whole tiles of the cast."""
    return padded_rows(count // group, f"1x{group}") * (group + 4)


@torch.no_grad()
def signs(x: Tensor, operation: str) -> Bits:
    """Which values an operation's backward lets through: all that `operations.reads_sign` says it reads of x."""
    flat = _in_memory(x)
    # The comparisons of the backwards, so that NaN goes the same way.
    mask = ~(flat <= 0) if operation in NOT_POSITIVE_IF_STOPPED else flat > 0
    return Bits(mask, Geometry.of(x))


@torch.no_grad()
def two_valued(x: Tensor) -> Bits | None:
    """A dense floating tensor of zeros and one positive number, exactly; None if it has other values.

    The host waits for the answer.
    """
    flat = _in_memory(x)
    one = flat.amax()
    mask = flat == one
    return Bits(mask, Geometry.of(x), one) if bool(((flat == 0) | mask).all()) and bool(one > 0) else None


@torch.no_grad()
def mask_bits(x: Tensor) -> Bits:
    """A dense bool tensor."""
    return Bits(_in_memory(x), Geometry.of(x))


def _in_memory(x: Tensor) -> Tensor:
    """The values of a dense tensor in the order of memory, [n]; a view."""
    return x.detach().as_strided((x.numel(),), (1,))


@cache
def _implementation(device: torch.device, granularity: str) -> str:
    return choose("quantise", [granularity], capabilities(device))
