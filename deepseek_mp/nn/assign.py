"""Which recipe each unit runs in: the one its plan asks for, or the region's where it cannot take that.

A scaled recipe is for linear layers and 1x1 convolutions of sizes that its granularities divide. Any other unit that
a scaled recipe covers runs in the format of the region around it, and the reason is kept for its decision. So does
the output layer, if the recipe is only the base of the plan: its errors go straight into the loss, and the
published FP8 recipes keep it in BF16. A rule that names it is obeyed.

Where emulation was agreed to, a convolution that is no such product has its operands rounded (`nn.emulated`) in the
recipes that allow it. One that is a product is computed as one, since that is what a device with FP8 would compute.
Recipes that nothing multiplies in (nvfp4) are all emulation: linear layers and convolutions of any size are rounded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

from torch import nn

from deepseek_mp.backends import Capabilities, default_device, fp8_recipe
from deepseek_mp.backends import capabilities as device_capabilities
from deepseek_mp.nn.conv1x1 import KINDS, Convolution, obstacle
from deepseek_mp.nn.emulated import can_be_emulated, how_it_is_multiplied
from deepseek_mp.nn.functional import Products, has_products, multiple_of
from deepseek_mp.nn.survey import Survey
from deepseek_mp.nn.unit import multiplies, original_class
from deepseek_mp.ops.choose import choose
from deepseek_mp.precision import RECIPES, PrecisionPlan, Reason, Recipe, Role


@dataclass(frozen=True, kw_only=True)
class Assigned:
    """What one unit gets."""

    recipe: Recipe
    """What it runs in."""
    products: Products | None = None
    """For a unit in a scaled recipe."""
    rounds: bool = False
    """Its operands are rounded only (`nn.emulated`)."""
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
        elif emulate and _is_rounded(recipe, module, None if why is None else why[0]):
            detail = how_it_is_multiplied(recipe, original_class(module))
            assigned[name] = Assigned(recipe=recipe, rounds=True, reason=Reason.EMULATED, detail=detail)
        elif why is not None:
            assigned[name] = Assigned(recipe=around(recipe), reason=why[0], detail=why[1])
        else:
            if recipe not in made:
                wanted = "reference" if kernels is None and recipe.name in emulated else kernels
                made[recipe] = products_of(recipe, device, wanted)
            assigned[name] = Assigned(recipe=recipe, products=made[recipe])
    return assigned


def _is_rounded(recipe: Recipe, module: nn.Module, why: Reason | None) -> bool:
    """Whether a unit that cannot multiply in the recipe, for this reason, is to have its operands rounded.

    None: it could, were there kernels for the recipe.
    """
    kind = original_class(module)
    if why is Reason.OUTPUT_LAYER or (why is None and has_products(recipe)) or "_conv_forward" in vars(module):
        return False
    return can_be_emulated(recipe, kind, groups=getattr(module, "groups", 1))


def around(recipe: Recipe) -> Recipe:
    """The plain recipe of what runs beside units of this recipe, and in the region around them."""
    return recipe if recipe.is_plain else RECIPES[recipe.region]


def output_layer(model: nn.Module, found: Survey) -> str | None:
    """The last unit in the model's order that multiplies, if it could do so in FP8 and is not one of many blocks.

    The order is a guess at the order of calls: a head defined before the blocks is not found.
    """
    multiplying = [name for name, module in found.units.items() if multiplies(original_class(module))]
    if not multiplying or _no_product(found.units[multiplying[-1]]) is not None:
        return None
    parts = multiplying[-1].split(".")
    enclosing = (model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts)))
    return None if any(isinstance(module, nn.ModuleList) for module in enclosing) else multiplying[-1]


def why_not(recipe: Recipe, module: nn.Module, *, is_output: bool) -> tuple[Reason, str] | None:
    """Why the unit cannot run in a scaled recipe, or None if it can."""
    other = _no_product(module)
    if other is not None and not has_products(recipe):
        return Reason.NO_KERNEL, f"{recipe.name} is emulated in nn.Linear and convolutions without groups only"
    if other is not None:
        return Reason.NO_KERNEL, f"{recipe.name} multiplies in nn.Linear and 1x1 convolutions only, not in {other}"
    multiple = multiple_of(recipe) if has_products(recipe) else 1  # operands that are only rounded take all sizes
    sizes = _sizes(module)
    fits = all(size and not size % multiple for size in sizes)
    # A convolution that does not fit says so: a rule for it would not be obeyed.
    if is_output and (fits or original_class(module) is nn.Linear):
        return Reason.OUTPUT_LAYER, "the last layer that multiplies; a rule or pin for it is obeyed"
    if not fits:
        return Reason.SHAPE, f"its weight is {list(sizes)} and {recipe.name} takes multiples of {multiple}"
    return None


def _no_product(module: nn.Module) -> str | None:
    """What the unit is, if its forward is not one product with its weight; None if it is."""
    kind = original_class(module)
    if kind is nn.Linear:
        return None
    if kind not in KINDS:
        return kind.__name__
    if "_conv_forward" in vars(module):
        return f"a {kind.__name__} whose _conv_forward was replaced"
    assert isinstance(module, Convolution)
    found = obstacle(module)
    return None if found is None else f"a {kind.__name__} with {found}"


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a linear layer or 1x1 convolution."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    assert isinstance(module, Convolution)
    return module.out_channels, module.in_channels


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
