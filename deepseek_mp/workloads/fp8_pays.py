"""Where FP8 begins to pay on a device: one linear layer in bf16 and in the device's own FP8 recipe, by width.

Casting to FP8 costs time in proportion to a layer's input and weight, and multiplying saves time in
proportion to their product. So narrow layers are slower in FP8 and wide ones faster, and where that turns
is a property of the device. Timed is what training computes: the forward and the gradients of input and
weight, casts included, in eager mode, with the input in bf16 and the weight in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from deepseek_mp.backends import autocast, capabilities, formats_of, fp8_recipe, math_mode
from deepseek_mp.costs import is_out_of_memory, time_call
from deepseek_mp.nn.assign import products_of
from deepseek_mp.nn.functional import Products, low_precision_linear
from deepseek_mp.precision.planning import PAYS

WIDTHS = (512, 1024, 2048, 4096)
ROWS = 8192

LayerTime = Callable[[torch.device, int, Products | None], float]
"""Milliseconds of a square layer of that width, in FP8 products or (None) in bf16."""


@dataclass(frozen=True, kw_only=True)
class WidthTimes:
    """Forward and backward of a layer with a square weight, in milliseconds."""

    width: int
    bf16_ms: float
    fp8_ms: float

    @property
    def pays(self) -> bool:
        """Whether FP8 is faster by what `auto` asks for."""
        return self.bf16_ms >= PAYS * self.fp8_ms


@dataclass(frozen=True, kw_only=True)
class Fp8Pays:
    """What was timed, and what follows from it."""

    recipe: str
    """The device's own FP8 recipe; empty if it has none."""
    rows: int
    """Rows of the layer's input."""
    times: tuple[WidthTimes, ...]
    why: str = ""
    """Why there are no times, or not of all widths."""

    @property
    def pays_from(self) -> int | None:
        """The smallest timed width from which FP8 is faster by at least 5 %, there and at all larger ones."""
        smallest = None
        for times in reversed(self.times):
            if not times.pays:
                break
            smallest = times.width
        return smallest

    @property
    def summary(self) -> str:
        """All of it in one sentence or two."""
        if not self.times:
            return f"FP8: {self.why}"
        listed = ", ".join(f"{one.fp8_ms:.3g} against {one.bf16_ms:.3g} ms at width {one.width}" for one in self.times)
        start = self.pays_from
        verdict = "is not 5 % faster at the largest width" if start is None else f"pays from width {start} on"
        ending = f"; {self.why}" if self.why else ""
        return (
            f"FP8 (recipe {self.recipe}) {verdict}. A linear layer of {self.rows} rows, FP8 and bf16: {listed}{ending}"
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe,
            "rows": self.rows,
            "times": [asdict(one) for one in self.times],
            "pays_from": self.pays_from,
            "why": self.why,
            "summary": self.summary,
        }


def fp8_pays(device: torch.device, *, widths: Sequence[int] = WIDTHS, layer_time: LayerTime | None = None) -> Fp8Pays:
    """Time a layer of each width in bf16 and in the device's own FP8 recipe, some seconds in all.

    Nothing is timed where the device does not multiply FP8 itself. Widths are timed in the order given
    until memory is short or the device's libraries fail; what was timed until then is kept.
    """
    products, why = own_products(device)
    if products is None:
        return Fp8Pays(recipe="", rows=ROWS, times=(), why=why)
    measure = layer_time or layer_ms
    times: list[WidthTimes] = []
    for width in widths:
        try:
            pair = measure(device, width, None), measure(device, width, products)
        except (RuntimeError, MemoryError) as error:  # an answer, not a failure
            problem = "memory is short" if is_out_of_memory(error) else str(error).partition("\n")[0]
            why = f"no time at width {width}: {problem}"
            break
        times.append(WidthTimes(width=width, bf16_ms=pair[0], fp8_ms=pair[1]))
    return Fp8Pays(recipe=products.recipe.name, rows=ROWS, times=tuple(times), why=why)


def own_products(device: torch.device) -> tuple[Products | None, str]:
    """The device's own FP8 recipe with what runs it; or None, and why the device has none."""
    found = capabilities(device)
    recipe = fp8_recipe(found)
    lacking = sorted(formats_of(recipe) - found.matmul_formats)
    if lacking:
        return None, f"{found.device_name} does not multiply {' and '.join(lacking)}"
    products = products_of(recipe, found, None)
    if products.is_emulated:
        return None, f"no product of this release runs the recipe {recipe.name} on {found.device_name}"
    return products, ""


def layer_ms(
    device: torch.device, width: int, products: Products | None, *, rows: int = ROWS, budget_s: float = 0.2
) -> float:
    """The median time, in milliseconds, of a layer's forward and backward; errors of its kernels propagate.

    Args:
        device: where to run it.
        width: input and output features.
        products: the FP8 products; None: bf16 as autocast gives it.
        rows: of the input.
        budget_s: how long to time it, after one call to warm up.
    """
    generator = torch.Generator(device=device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x = drawn(rows, width).bfloat16().requires_grad_()
    weight = drawn(width, width).requires_grad_()
    gradient = drawn(rows, width).bfloat16()

    def step() -> None:
        with torch.enable_grad(), autocast(device, "bf16"):
            output = F.linear(x, weight) if products is None else low_precision_linear(x, weight, None, products)
        torch.autograd.grad(output, (x, weight), gradient)

    with math_mode(device, fp32="ieee", search=False):
        return time_call(step, device, budget_s=budget_s).median_ms
