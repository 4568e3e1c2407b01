"""Which layers a plan lowers, and what each saves: milliseconds where they were measured, else its operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deepseek_mp.nn.nested import first_tensor
from deepseek_mp.nn.unit import is_known, multiplies, original_class
from deepseek_mp.precision import RECIPES, Decision, PrecisionPlan, Recipe

FP32_BITS = 32


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A layer that multiplies in less than FP32 under a plan."""

    name: str
    recipe: Recipe
    saved_ms: float | None
    """Milliseconds a step against FP32, if the plan was measured; less than 0 for a layer that is slower alone."""
    flops: float
    """Floating-point operations of its products with its weights, in the forward pass of one batch."""


def lowered_layers(model: nn.Module, plan: PrecisionPlan, flops: Mapping[str, float]) -> list[Lowered]:
    """The layers that a plan, with the decisions it has in force on the model, lowers; in the model's order.

    Only those that multiply: a norm or an embedding in a narrow region saves nothing by itself.
    """
    recipes = {**RECIPES, **{recipe.name: recipe for recipe in (plan.base, *(rule.recipe for rule in plan.rules))}}
    return [
        Lowered(
            name=decision.layer,
            recipe=recipes[decision.new],
            saved_ms=_saved_ms(decision, plan),
            flops=flops.get(decision.layer, 0.0),
        )
        for decision in plan.decisions
        if is_narrow(recipes[decision.new]) and has_product(model.get_submodule(decision.layer))
    ]


def by_saving(layers: Sequence[Lowered]) -> list[Lowered]:
    """The layers, those that save most first: time if any of it was measured, else operations."""
    if any(layer.saved_ms is not None for layer in layers):
        return sorted(layers, key=lambda layer: (-(layer.saved_ms or 0.0), -layer.flops))
    return sorted(layers, key=lambda layer: -layer.flops)


def is_narrow(recipe: Recipe) -> bool:
    """Whether some operand of a recipe has fewer bits than FP32."""
    return any(side.format.bits < FP32_BITS for side in recipe.sides())


def has_product(module: nn.Module) -> bool:
    """Whether a module is a unit that multiplies matrices."""
    kind = original_class(module)
    return is_known(kind) and multiplies(kind)


@contextmanager
def counted_flops(model: nn.Module) -> Iterator[Counter[str]]:
    """Counts, while the model is called, the operations of each unit's products with its weights: layer -> FLOPs."""
    flops: Counter[str] = Counter()
    handles = [
        module.register_forward_hook(_counting(flops, name), with_kwargs=True)
        for name, module in model.named_modules()
        if has_product(module)
    ]
    try:
        yield flops
    finally:
        for handle in handles:
            handle.remove()


def _counting(flops: Counter[str], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given, made = first_tensor((args, kwargs)), first_tensor(output)
        if given is not None and made is not None:
            weights = sum(p.numel() for p in module.parameters(recurse=False) if p.dim() > 1)
            flops[name] += 2 * weights * positions(module, given, made)

    return hook


def positions(module: nn.Module, given: Tensor, made: Tensor) -> int:
    """How often a unit's weights are multiplied with a vector in one call: rows of a matrix, places of an image.

    A convolution has one place for each element of a channel of its output, a transposed one of its input.
    """
    channels_out, channels_in = getattr(module, "out_channels", None), getattr(module, "in_channels", None)
    if isinstance(channels_out, int) and isinstance(channels_in, int):
        return given.numel() // channels_in if getattr(module, "transposed", False) else made.numel() // channels_out
    return given.numel() // max(given.shape[-1], 1) if given.dim() else 1


def _saved_ms(decision: Decision, plan: PrecisionPlan) -> float | None:
    """What the decision's evidence says: its time in FP32, in either memory format, less that in its own recipe."""
    layouts = ("", "_channels_last")
    own_layouts = layouts[::-1] if plan.memory_format == "channels_last" else layouts
    plain = _first(decision.evidence, [f"fp32{layout}_ms" for layout in layouts])
    own = _first(decision.evidence, [f"{decision.new}{layout}_ms" for layout in own_layouts])
    return None if plain is None or own is None else plain - own


def _first(evidence: Mapping[str, Any], names: Sequence[str]) -> float | None:
    found = (evidence[name] for name in names if name in evidence)
    return next((float(value) for value in found if isinstance(value, int | float)), None)
