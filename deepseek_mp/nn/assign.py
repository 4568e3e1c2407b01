"""Which recipe each unit runs in: the one its plan asks for, or the region's where it cannot take that.

A scaled recipe is for linear layers of sizes that its granularities divide. Any other unit that a scaled
recipe covers runs in the format of the region around it, and the reason is kept for its decision. So does
the output layer, if the recipe is only the base of the plan: its errors go straight into the loss, and the
published FP8 recipes keep it in BF16. A rule that names it is obeyed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from torch import nn

from deepseek_mp.backends import Capabilities, default_device, fp8_recipe
from deepseek_mp.backends import capabilities as device_capabilities
from deepseek_mp.nn.emulated import can_be_emulated
from deepseek_mp.nn.functional import Products, multiple_of
from deepseek_mp.nn.survey import Survey
from deepseek_mp.nn.unit import multiplies, original_class
from deepseek_mp.ops.choose import choose
from deepseek_mp.precision import RECIPES, PrecisionPlan, Reason, Recipe, Role

EMULATED = "rounded to FP8 and multiplied in BF16, to study accuracy"


@dataclass(frozen=True, kw_only=True)
class Assigned:
    """What one unit gets."""

    recipe: Recipe
    """What it runs in."""
    products: Products | None = None
    """For a linear layer in a scaled recipe."""
    reason: Reason | None = None
    """Why it does not run in the recipe that the plan asks for; None if it does."""
    detail: str = ""


def devices_of(model: nn.Module, capabilities: Capabilities | None) -> list[Capabilities]:
    """What the model's devices can do: as given, or those its parameters are on."""
    if capabilities is not None:
        return [capabilities]
    devices = {parameter.device for parameter in model.parameters()} or {default_device()}
    return [device_capabilities(device) for device in sorted(devices, key=str)]


def for_device(plan: PrecisionPlan, devices: Sequence[Capabilities]) -> PrecisionPlan:
    """The plan with the recipe 'fp8' replaced by what it means on the (first) device."""
    stands_for = RECIPES["fp8"]
    if stands_for not in (plan.base, *(rule.recipe for rule in plan.rules)):
        return plan
    best = fp8_recipe(devices[0])
    rules = tuple(replace(rule, recipe=best) if rule.recipe == stands_for else rule for rule in plan.rules)
    return replace(plan, base=best if plan.base == stands_for else plan.base, rules=rules)


def assign(
    model: nn.Module,
    plan: PrecisionPlan,
    found: Survey,
    *,
    device: Capabilities,
    emulated: frozenset[str],
    emulate: bool = False,
    kernels: str | None,
) -> Mapping[str, Assigned]:
    """What every unit gets, by name; `FormatError` if a recipe has no implementation, or not the one asked for."""
    last = output_layer(model, found)
    made: dict[Recipe, Products] = {}
    assigned: dict[str, Assigned] = {}
    for name, module in found.units.items():
        recipe, is_base = plan.recipe_for(name), plan.rule_for(name) is None
        why = None if recipe.is_plain else why_not(recipe, module, is_output=is_base and name == last)
        if recipe.is_plain:
            assigned[name] = Assigned(recipe=recipe)
        elif emulate and can_be_emulated(recipe, original_class(module)):
            products = _interned(recipe, "reference", "reference")
            assigned[name] = Assigned(recipe=recipe, products=products, reason=Reason.EMULATED, detail=EMULATED)
        elif why is not None:
            assigned[name] = Assigned(recipe=around(recipe), reason=why[0], detail=why[1])
        else:
            if recipe not in made:
                wanted = "reference" if kernels is None and recipe.name in emulated else kernels
                made[recipe] = products_of(recipe, device, wanted)
            assigned[name] = Assigned(recipe=recipe, products=made[recipe])
    return assigned


def around(recipe: Recipe) -> Recipe:
    """The plain recipe of what runs beside units of this recipe, and in the region around them."""
    return recipe if recipe.is_plain else RECIPES[recipe.region]


def output_layer(model: nn.Module, found: Survey) -> str | None:
    """The last unit in the model's order that multiplies, if that is a linear layer and not one of many blocks.

    The order is a guess at the order of calls: a head defined before the blocks is not found.
    """
    multiplying = [name for name, module in found.units.items() if multiplies(original_class(module))]
    if not multiplying or original_class(found.units[multiplying[-1]]) is not nn.Linear:
        return None
    parts = multiplying[-1].split(".")
    enclosing = (model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts)))
    return None if any(isinstance(module, nn.ModuleList) for module in enclosing) else multiplying[-1]


def why_not(recipe: Recipe, module: nn.Module, *, is_output: bool) -> tuple[Reason, str] | None:
    """Why the unit cannot run in a scaled recipe, or None if it can."""
    kind = original_class(module)
    if kind is not nn.Linear:
        return Reason.NO_KERNEL, f"{recipe.name} multiplies in nn.Linear only, not in {kind.__name__}"
    if is_output:
        return Reason.OUTPUT_LAYER, "the last linear layer; a rule or pin for it is obeyed"
    assert isinstance(module, nn.Linear)
    multiple = multiple_of(recipe)
    sizes = (module.out_features, module.in_features)
    if any(size % multiple or not size for size in sizes):
        return Reason.SHAPE, f"its weight is {list(sizes)} and {recipe.name} takes multiples of {multiple}"
    return None


def products_of(recipe: Recipe, device: Capabilities, kernels: str | None) -> Products:
    """The recipe with the implementations that the device runs it with; equal ones are one object."""
    roles = [recipe.role(role) for role in Role if recipe.role(role).left.is_scaled]
    casts = sorted({side.granularity.name for role in roles for side in (role.left, role.right)})
    pairs = sorted({(role.left.granularity.name, role.right.granularity.name) for role in roles})
    return _interned(
        recipe,
        choose("quantise", casts, device, None if kernels == "native" else kernels),
        choose("product", pairs, device, kernels),
    )


@cache
def _interned(recipe: Recipe, quantise: str, product: str) -> Products:
    return Products(recipe=recipe, quantise=quantise, product=product)
