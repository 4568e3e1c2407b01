"""The shortest time of a decoder's step in FP8, from measured rates of casts and products.

    floor = products + casts + rest
    products   the three products of every linear layer but the output layer, each at the rate measured
               for its pair of granularities at the nearest size, by the fastest implementation
    casts      every distinct tensor that a product reads, cast once to both layouts: inputs (gate and up
               share theirs), gradients of the outputs, weights
    rest       what the measured bf16 step has beside the same products and the casts of the same weights,
               at the rates measured for bf16 products and for a copy

It is the floor of an implementation that casts in passes of their own. With casts fused into what makes
the tensors, only the FP8 values would be written: `fused_casts_ms`, at the rate of a copy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import slug

from deepseek_mp.backends import capabilities
from deepseek_mp.precision import RECIPES
from deepseek_mp.precision.roles import Role

TOKENS = 16384
DECODERS = {"decoder-8b-slice": (4096, 14336, 8), "decoder-1.3b": (2048, 5632, 24)}
"""Width, hidden width and layers, as in `cases.py`; both train on `TOKENS` tokens a step."""
FLOOR_RECIPES = ("block", "tensor", "row")
BF16_STEPS = ("bf16-compiled", "bf16")
"""The contenders of `fp8.py` whose step gives the rest, the first that was measured."""
Sizes = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Medians of what was measured: FLOP/s of products by name and sizes, bytes/s of casts."""

    products: Mapping[str, Mapping[Sizes, float]]
    casts: Mapping[tuple[str, str], float]

    @classmethod
    def of(cls, cases: Mapping[str, Mapping[str, Any]]) -> Rates:
        """The rates in a report of `fp8_kernels`."""
        products: dict[str, dict[Sizes, float]] = {}
        casts: dict[tuple[str, str], float] = {}
        for case, result in cases.items():
            for name, spread in result.get("tflops", {}).items():
                sizes: Any = tuple(result["sizes"])
                products.setdefault(name, {})[sizes] = spread["median"] * 1e12
            for name, spread in result.get("gb_per_s", {}).items():
                casts[case.removeprefix("cast "), name] = spread["median"] * 1e9
        return cls(products=products, casts=casts)

    def product_ms(self, sizes: Sizes, pair: tuple[str, str] | None, *, to_fp32: bool = False) -> float:
        """The time of one product; no pair: in bf16. `LookupError` if nothing was measured for the pair."""
        suffix = "bf16" if pair is None else f" {pair[0]} x {pair[1]}" + " to fp32" * to_fp32
        known = [rates for name, rates in self.products.items() if name.endswith(suffix)]
        if not known:
            raise LookupError(f"no rate of a product in {suffix.strip()}")
        rate = max(rates[min(rates, key=lambda other: _distance(sizes, other))] for rates in known)
        return 2 * math.prod(sizes) / rate * 1e3


def floor(case: str, rates: Rates, bf16: Mapping[str, Any] | None) -> dict[str, Any]:
    """The floor of each recipe and its parts in ms; without a bf16 step, of products and casts alone."""
    width, hidden, layers = DECODERS[case]
    bf16_products = layers * sum(
        rates.product_ms(sizes, None) for role in Role for sizes in _products(width, hidden, role)
    )
    weight_bytes = (4 + 2) * layers * sum(n * k for n, k in _linears(width, hidden))
    bf16_casts = 1e3 * weight_bytes / rates.casts["weight", "copy"]
    rest = None if bf16 is None else bf16["step_ms"] - bf16_products - bf16_casts
    recipes, failed = {}, {}
    for recipe in FLOOR_RECIPES:
        try:
            recipes[recipe] = _of_recipe(recipe, rates, rest, (width, hidden, layers))
        except LookupError as error:
            failed[recipe] = str(error)
    return {
        "formula": (__doc__ or "").split("\n\n")[1],
        "bf16_step": bf16 or "not measured; give the floor its step by running the case first",
        "bf16_products_ms": round(bf16_products, 2),
        "recipes": recipes,
        "failed": failed,
        "check": "passed",
    }


def _of_recipe(name: str, rates: Rates, rest: float | None, decoder: tuple[int, int, int]) -> dict[str, Any]:
    width, hidden, layers = decoder
    recipe = RECIPES[name]
    products = 0.0
    for role in Role:
        sides = recipe.role(role)
        pair = (sides.left.granularity.name, sides.right.granularity.name)
        to_fp32 = role == Role.WGRAD
        products += sum(rates.product_ms(sizes, pair, to_fp32=to_fp32) for sizes in _products(width, hidden, role))
    fprop = recipe.role(Role.FPROP)
    activations = TOKENS * (_inputs(width, hidden) + _outputs(width, hidden))
    weights = sum(n * k for n, k in _linears(width, hidden))
    casts = 1e3 * (
        activations * (2 + 2) / rates.casts["activation", fprop.left.granularity.name]
        + weights * (4 + 2) / rates.casts["weight", fprop.right.granularity.name]
    )
    fused = 1e3 * 2 * (activations + weights) / rates.casts["activation", "copy"]
    total = layers * (products + casts) + (rest or 0.0)
    return {
        "floor_ms": round(total, 2),
        "products_ms": round(layers * products, 2),
        "casts_ms": round(layers * casts, 2),
        "fused_casts_ms": round(layers * fused, 2),
        "rest_ms": None if rest is None else round(rest, 2),
    }


def _linears(width: int, hidden: int) -> list[tuple[int, int]]:
    """(out, in) of a block's linear layers: qkv, out, gate, up, down."""
    return [(3 * width, width), (width, width), (hidden, width), (hidden, width), (width, hidden)]


def _products(width: int, hidden: int, role: Role) -> Iterator[Sizes]:
    """(outer left, contraction, outer right) of one product of each linear layer of a block."""
    for n, k in _linears(width, hidden):
        yield {Role.FPROP: (TOKENS, k, n), Role.DGRAD: (TOKENS, n, k), Role.WGRAD: (n, TOKENS, k)}[role]


def _inputs(width: int, hidden: int) -> int:
    """Columns of the distinct inputs of a block's linear layers."""
    return 3 * width + hidden


def _outputs(width: int, hidden: int) -> int:
    """Columns of the outputs, each with a gradient that is cast."""
    return sum(n for n, _ in _linears(width, hidden))


def _distance(sizes: Sizes, other: Sizes) -> float:
    """How unlike two products are: for the contraction and the two outer sizes, the logarithm of the ratio."""
    ours, theirs = ((size[1], *sorted((size[0], size[2]))) for size in (sizes, other))
    return sum(abs(math.log(a / b)) for a, b in zip(ours, theirs, strict=True))


def bf16_step_ms(case: str, device: torch.device, folders: Sequence[Path]) -> dict[str, Any] | None:
    """The measured bf16 step of the case on this device, from the result file of `fp8.py`; None without one."""
    name = f"fp8-{case}-{slug(capabilities(device).device_name)}.json"
    for path in (folder / name for folder in folders):
        if not path.exists():
            continue
        contenders = json.loads(path.read_text(encoding="utf-8"))["cases"][case]["contenders"]
        for contender in BF16_STEPS:
            spread = contenders.get(contender, {}).get("step_ms")
            if spread is not None:
                return {"contender": contender, "step_ms": spread["median"], "file": path.name}
    return None
