"""How fast this machine multiplies matrices, format by format, measured.

A square product of size n takes 2 n^3 operations. The size doubles until one product lasts long enough
to be timed well, so a fast device gets large matrices and a slow format stays small: fp16 on a CPU
without units for it is tens of times slower than fp32. The shortest of several runs counts: it is the
one that other work on the machine disturbed least.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deepseek_mp.backends import capabilities, math_mode
from deepseek_mp.costs import is_out_of_memory, time_call
from deepseek_mp.ops.dtypes import torch_dtype

FORMATS = ("fp32", "tf32", "hf32", "bf16", "fp16")
SMALLEST, LARGEST = 128, 8192
LONG_ENOUGH_MS = 20.0


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The measured rate of one format: billions of operations per second, or why there is none."""

    format: str
    native: bool
    """Whether the device has units for the format; otherwise PyTorch emulates it."""
    gflops: float | None
    size: int
    """Rows and columns of the matrices."""
    shortest_ms: float | None
    problem: str = ""


def matmul_rates(device: torch.device, *, long_enough_ms: float = LONG_ENOUGH_MS, budget_s: float = 0.3) -> list[Rate]:
    """Rates of fp32 and of every lower format that PyTorch can multiply on the device.

    `budget_s` is spent on the final measurement of each format.
    """
    native = capabilities(device).matmul_formats
    asked = [name for name in FORMATS if name in native or name in ("fp32", "bf16", "fp16")]
    return [_rate(name, device, name in native, long_enough_ms, budget_s) for name in asked]


def _rate(name: str, device: torch.device, native: bool, long_enough_ms: float, budget_s: float) -> Rate:
    """The rate at the smallest size whose product lasts `long_enough_ms`, or at the largest size."""
    size = SMALLEST
    try:
        while _product_ms(name, device, size, budget_s=0.0) < long_enough_ms and size < LARGEST:
            size *= 2
        milliseconds = _product_ms(name, device, size, budget_s=budget_s)
    except RuntimeError as error:  # no kernel for the format, or no memory: an answer, not a failure
        problem = "out of memory" if is_out_of_memory(error) else str(error).splitlines()[0]
        return Rate(format=name, native=native, gflops=None, size=size, shortest_ms=None, problem=problem)
    gflops = 2 * size**3 / (milliseconds * 1e6)
    return Rate(format=name, native=native, gflops=gflops, size=size, shortest_ms=milliseconds)


def _product_ms(name: str, device: torch.device, size: int, *, budget_s: float) -> float:
    """The shortest time, in milliseconds, of one product of two [size, size] matrices."""
    dtype = torch.float32 if name in ("tf32", "hf32") else torch_dtype(name)
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    fp32 = name if name in ("tf32", "hf32") else "ieee"
    with math_mode(device, fp32=fp32, search=False):  # type: ignore[arg-type]
        return time_call(lambda: left @ right, device, budget_s=budget_s).low_ms
