"""The FP8 casts and products themselves, and the shortest step of a decoder that their rates allow.

Casts are given in GB/s, each counted as reading the matrix once and writing both FP8 layouts, beside a
device copy of the same matrix. Products are given in TFLOP/s beside bf16's. All implementations of one
size take turns in one run. A product far from bf16's, or not finite (multiplying NaN draws less power
and runs faster), does not count.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fp8_floor
import torch
from harness import Report, Spread
from replayed import only_failed, problem, times
from torch import Tensor

from deepseek_mp.backends import math_mode
from deepseek_mp.ops.schema import product

FORMAT = "fp8_e4m3"
ROWS = 16384
PRODUCTS = ((ROWS, 4096, 4096), (ROWS, 14336, 4096), (ROWS, 4096, 14336), (ROWS, 2048, 5632))
"""(outer of the left operand, contraction, outer of the right one)."""
PAIRS = (("tensor", "tensor"), ("row", "row"), ("1x128", "128x128"), ("1x128", "1x128"))
OUT = {torch.bfloat16: "", torch.float32: " to fp32"}
"""Types of the result, and how they end a product's name; gradients of weights are made in fp32."""
CASTS = {
    "activation": ((ROWS, 4096), torch.bfloat16, ("1x128", "tensor", "row")),
    "weight": ((14336, 4096), torch.float32, ("128x128", "tensor", "row")),
}
"""Shape, dtype and granularities of what is cast."""
LARGEST_ERROR = 0.08
"""Of a product of normal random values in E4M3, relative to bf16's in the L2 norm; rounding alone gives 0.04."""
ROUNDS, ROUNDS_SMALL = 8, 2
CAST_BYTES = "rows * columns * (bytes per value read + 1 + 1 written), scales left out"
PRODUCT_FLOPS = "2 * outer left * contraction * outer right"


def measure(device: torch.device, arguments: Mapping[str, Any], *, small: bool, results: Sequence[Path]) -> Report:
    """Casts, products and floors; `results` are the folders searched for the measured bf16 steps."""
    report = Report("fp8-kernels", device, arguments)
    implementations = ("reference",) if device.type == "cpu" else ("triton", "native")
    rounds = ROUNDS_SMALL if small else ROUNDS
    with math_mode(device, fp32="tf32" if device.type != "cpu" else "ieee", search=False):
        for kind in CASTS:
            report.run(f"cast {kind}", partial(casts, kind, device, implementations[0], rounds, small=small))
        for sizes in PRODUCTS:
            used = _shrunk(sizes) if small else sizes
            name = "product " + " x ".join(map(str, used))
            report.run(name, partial(products, used, device, implementations, rounds))
    rates = fp8_floor.Rates.of(report.cases)
    for case in fp8_floor.DECODERS:
        report.run(
            f"floor {case}", partial(fp8_floor.floor, case, rates, fp8_floor.bf16_step_ms(case, device, results))
        )
    return report


def casts(kind: str, device: torch.device, implementation: str, rounds: int, *, small: bool) -> dict[str, Any]:
    """GB/s of a cast to both layouts in each granularity, and of a copy."""
    full, dtype, granularities = CASTS[kind]
    shape = _shrunk(full) if small else full
    x = torch.randn(shape, device=device).to(dtype)
    other = torch.empty_like(x)
    calls: dict[str, Callable[[], object]] = {"copy": lambda: other.copy_(x)}
    for granularity in granularities:
        calls[granularity] = partial(quantise, x, granularity, implementation)
    moved = {name: x.numel() * (2 * x.itemsize if name == "copy" else x.itemsize + 2) for name in calls}
    taken, failed = times(calls, device, rounds)
    return {
        "shape": shape,
        "dtype": str(dtype),
        "implementation": implementation,
        "bytes": CAST_BYTES,
        "gb_per_s": {name: Spread.of([moved[name] / ms / 1e6 for ms in values]) for name, values in taken.items()},
        "failed": failed,
        "check": "; ".join(f"{name}: {why}" for name, why in failed.items()) or "passed",
    }


def quantise(x: Tensor, granularity: str, implementation: str) -> tuple[Tensor, ...]:
    """`x` in both layouts."""
    result: tuple[Tensor, ...] = torch.ops.deepseek_mp.quantise(
        x, FORMAT, granularity, False, True, True, implementation
    )
    return result


def products(
    sizes: tuple[int, ...], device: torch.device, implementations: Sequence[str], rounds: int
) -> dict[str, Any]:
    """TFLOP/s of a product in bf16 and, in FP8, of each pair of granularities by each implementation."""
    outer, contraction, inner = sizes
    left = torch.randn(outer, contraction, device=device).bfloat16()
    right = torch.randn(inner, contraction, device=device).bfloat16()
    exact = left @ right.t()
    calls: dict[str, Callable[[], object]] = {"bf16": lambda: torch.mm(left, right.t())}
    caster = implementations[0]
    failed: dict[str, str] = {}
    errors: dict[str, float] = {}
    for pair in PAIRS:
        operands = [x for side, name in zip((left, right), pair, strict=True) for x in quantise(side, name, caster)[:2]]
        for implementation, out in itertools.product(implementations, OUT):
            name = f"{implementation} {pair[0]} x {pair[1]}{OUT[out]}"
            call = partial(_product, operands, pair, out, implementation)
            errors[name], failed[name] = _compare(call, exact)
            if not failed[name]:
                calls[name] = call
    taken, more = times(calls, device, rounds)
    flops = 2 * outer * contraction * inner
    failed = only_failed(failed | more)
    void = [f"{name}: {why}" for name, why in failed.items() if why.startswith("void")]
    return {
        "sizes": sizes,
        "flops": PRODUCT_FLOPS,
        "tflops": {name: Spread.of([flops / ms / 1e9 for ms in values]) for name, values in taken.items()},
        "relative_error": {name: round(error, 5) for name, error in errors.items() if math.isfinite(error)},
        "failed": failed,
        "check": "; ".join(void) or "passed",
    }


def _product(operands: Sequence[Tensor], pair: tuple[str, str], out: torch.dtype, implementation: str) -> Tensor:
    """`operands`: left, its scales, right, its scales."""
    left, left_scale, right, right_scale = operands
    result: Tensor = product(left, left_scale, right, right_scale, pair, None, out, implementation=implementation)
    return result


def _compare(call: Callable[[], Tensor], exact: Tensor) -> tuple[float, str]:
    """The result's distance from `exact` in the L2 norm, relative, and why it does not count; empty if it does."""
    found: list[Tensor] = []
    why = problem(lambda: found.append(call()))
    if why:
        return math.nan, why
    apart = torch.linalg.vector_norm(found[0][: exact.shape[0], : exact.shape[1]].float() - exact.float())
    error = float(apart / torch.linalg.vector_norm(exact.float()))
    return error, "" if error <= LARGEST_ERROR else f"void: {error:.3f} from the bf16 product"


def _shrunk(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Small multiples of a block's side."""
    return tuple(max(128, size // 32 // 128 * 128) for size in sizes)


def rows(report: Report) -> list[tuple[str, ...]]:
    """The table: a line per rate and per floor."""
    table: list[tuple[str, ...]] = [("measured", "what", "rate or time", "note")]
    for case, result in report.cases.items():
        for key, unit in (("gb_per_s", "GB/s"), ("tflops", "TFLOP/s")):
            for name, spread in result.get(key, {}).items():
                table.append((case, name, f"{Spread(**spread)} {unit}", ""))
        for name, why in result.get("failed", {}).items():
            table.append((case, name, "-", why))
        for recipe, floor in result.get("recipes", {}).items():
            parts = ", ".join(f"{part} {floor[part]}" for part in ("products_ms", "casts_ms", "rest_ms"))
            table.append((case, recipe, f"{floor['floor_ms']} ms", parts))
    return table
