"""Saved tensors brought into a smaller form: FP8 by the casts of `ops`, or bits."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from deepseek_mp.activations.operations import NOT_POSITIVE_IF_STOPPED
from deepseek_mp.activations.settings import GROUPS
from deepseek_mp.activations.stored import Bits, Geometry, Rounded
from deepseek_mp.backends import capabilities
from deepseek_mp.ops.choose import choose, quantise_of
from deepseek_mp.ops.layouts import padded_rows
from deepseek_mp.ops.operands import Cast
from deepseek_mp.ops.packing import Rule, pack_bits

FORMAT = "fp8_e4m3"
DEVICES = ("cpu", "cuda")
"""Types of devices whose FP8 tensors are known to work here; those of AMD are called cuda too."""
FLOATING = (torch.float32, torch.bfloat16, torch.float16)
"""What the casts take."""
CPU_PIECE = 1 << 18
"""Values that a CPU casts at once, in its caches: a multiple of 128 rows, so that none are added in between."""
REFERENCE_PIECE = 1 << 22
"""Values that plain PyTorch casts at once on another device."""
KERNEL_PIECE = 1 << 29
"""Values that a kernel casts at once: twice as many would be more tiles than a grid has."""
_SEEDS = 1 << 63
_CASTS = {group: Cast(FORMAT, f"1x{group}", power_of_two=False, rows=True, columns=False) for group in GROUPS}


def is_dense(x: Tensor) -> bool:
    """Whether the values of a strided tensor fill a piece of memory without gaps, each once."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


@torch.no_grad()
def rounded(x: Tensor, group: int, seed: Tensor | int | None) -> Rounded:
    """A dense tensor in FP8, by groups in the order of memory.

    Args:
        x: fp32, bf16 or fp16, of any shape, dense.
        group: values that share a scale, 32 or 128.
        seed: of stochastic rounding, a number or int64 [] on the device of x; None: to the nearest.
    """
    flat = _in_memory(x)
    count = flat.numel()
    whole = count // group * group
    implementation = _implementation(x.device, f"1x{group}")
    together = _together(x.device, implementation)
    parts = flat[:whole].split(together) if whole > together else [flat[:whole]]
    run = quantise_of(implementation)
    cast = [
        run(part.view(-1, group), _CASTS[group], _seed(seed, number, x.device))[:2] for number, part in enumerate(parts)
    ]
    values, scale = cast[0] if len(cast) == 1 else _joined(cast)
    return Rounded(values, scale, None if whole == count else flat[whole:].clone(), Geometry.of(x))


def _joined(cast: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    with torch.autocast(cast[0][0].device.type, enabled=False):
        return torch.cat([values for values, _ in cast]), torch.cat([scale for _, scale in cast], 1)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Forwards run in autocast regions, which would cast in between, and refuse FP8. Kernels know nothing of them."""
    kernels = all(_implementation(device, f"1x{group}") == "triton" for group in GROUPS)
    return nullcontext() if kernels else torch.autocast(device.type, enabled=False)


def _together(device: torch.device, implementation: str) -> int:
    """How many values are cast at once."""
    if implementation != "reference":
        return KERNEL_PIECE
    # The reference computes random numbers in int64: whole tensors of them would take more memory than is saved.
    return CPU_PIECE if device.type == "cpu" else REFERENCE_PIECE


def _seed(seed: Tensor | int | None, number: int, device: torch.device) -> Tensor | None:
    """The seed of a piece; `number` tells the pieces of a tensor apart."""
    if isinstance(seed, int):
        return torch.full((), (seed + number) % _SEEDS, dtype=torch.int64, device=device)
    return seed if seed is None or number == 0 else seed + number


def rounded_bytes(count: int, group: int) -> int:
    """Bytes that `rounded` takes for so many values, nearly: rows are added up to whole tiles of the cast."""
    return padded_rows(count // group, f"1x{group}") * (group + 4)


def signs(x: Tensor, operation: str) -> Bits:
    """Which values an operation's backward lets through: all that `operations.reads_sign` says it reads of x."""
    # The comparisons of the backwards, so that NaN goes the same way.
    rule: Rule = "not_below" if operation in NOT_POSITIVE_IF_STOPPED else "above"
    return Bits(pack_bits(_in_memory(x), rule), Geometry.of(x))


@torch.no_grad()
def two_valued(x: Tensor) -> Bits | None:
    """A dense floating tensor of zeros and one positive number, exactly; None if it has other values.

    The host waits for the answer: it is asked of tensors on a CPU only.
    """
    flat = _in_memory(x)
    one = flat.amax()
    is_one = flat == one
    if not (bool(((flat == 0) | is_one).all()) and bool(one > 0)):
        return None
    return Bits(pack_bits(is_one), Geometry.of(x), one)


def mask_bits(x: Tensor) -> Bits:
    """A dense bool tensor."""
    return Bits(pack_bits(_in_memory(x)), Geometry.of(x))


def _in_memory(x: Tensor) -> Tensor:
    """The values of a dense tensor in the order of memory, [n]; a view."""
    return x.detach().as_strided((x.numel(),), (1,))


@cache
def _implementation(device: torch.device, granularity: str) -> str:
    return choose("quantise", [granularity], capabilities(device))
