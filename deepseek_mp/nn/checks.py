"""Everything that can refuse a plan for a model; all of it runs before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from deepseek_mp.backends import Capabilities, formats_of, nearest_recipe
from deepseek_mp.errors import ConfigError, FormatError, PlanError, explain, suggest
from deepseek_mp.nn.assign import products_of
from deepseek_mp.nn.emulated import can_be_rounded
from deepseek_mp.nn.functional import has_products
from deepseek_mp.nn.survey import Survey
from deepseek_mp.nn.unit import UNIT_FORMATS, multiplies, original_class
from deepseek_mp.ops.choose import IMPLEMENTATIONS
from deepseek_mp.ops.dtypes import format_of, torch_dtype
from deepseek_mp.ops.layouts import alignment
from deepseek_mp.ops.storage_marks import storage_of
from deepseek_mp.precision import FORMATS, RECIPES, PrecisionPlan, Recipe, ScaleRule
from deepseek_mp.precision.recipe import OperandRecipe
from deepseek_mp.precision.scaling import TENSOR

KERNELS = IMPLEMENTATIONS["product"]
"""Names that `kernels=` takes."""
_REDUCED_FP32 = ("tf32", "hf32")
_SHARDING = ("torch.distributed.fsdp", "torch.distributed.tensor")
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def check_model(model: nn.Module) -> None:
    """`PlanError` for models whose classes or parameters cannot be converted in place."""
    scripted, sharded, lazy = [], [], []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            scripted.append(name or "(model)")
            continue
        parameters = [p for p in module._parameters.values() if p is not None]  # noqa: SLF001
        if _is_sharded(type(module)) or any(_is_sharded(type(p)) for p in parameters):
            sharded.append(name or "(model)")
        lazy += [name or "(model)" for p in parameters if is_lazy(p)]
    if scripted:
        raise _refuse(f"{_list(scripted)} is compiled by TorchScript", "Python modules", "Convert, then script a copy")
    if sharded:
        raise _refuse(f"{_list(sharded)} is sharded (FSDP, DTensor)", "plain tensors", "Convert before sharding")
    if lazy:
        raise _refuse(
            f"{_list(dict.fromkeys(lazy))} has parameters without a shape yet",
            "initialised modules",
            "Run one batch through the model first, so that its lazy modules take their shapes",
        )


def check_recipes(plan: PrecisionPlan, *, emulate: bool) -> None:
    """`PlanError` for a recipe that no unit can run: neither plain, nor made of scaled FP8 products, nor emulated."""
    for recipe in _recipes(plan):
        if RECIPES.get(recipe.name, recipe) != recipe:
            raise _refuse(
                f"a recipe called {recipe.name!r} that is not the known one of this name",
                "a name of its own for every recipe: reports and decisions speak of recipes by name",
                f"Rename it, dataclasses.replace(recipe, name='my_{recipe.name}')",
            )
        if recipe.is_plain:
            continue
        finer = {side.granularity.name for side in recipe.sides() if _is_delayed(side)} - {TENSOR.name}
        if finer:
            raise _refuse(
                f"recipe {recipe.name!r}, whose {' and '.join(sorted(finer))} scales come from past steps",
                "delayed scales of whole tensors: other groups have a scale of their own in every step",
                "Use granularity 'tensor', or rule 'current'",
            )
        if not has_products(recipe):
            # Whether the device emulates a known one is asked later, where the device is known.
            possible = can_be_rounded(recipe)
            if possible and (emulate or recipe.name in RECIPES):
                continue
            raise _refuse(
                f"recipe {recipe.name!r}, which is not one unscaled format for all products, nor one whose "
                f"products are FP8 with scales or {recipe.region}",
                f"in this release units run {', '.join(UNIT_FORMATS)} and scaled FP8",
                f"Choose one of {', '.join(RECIPES)}, or change only its formats and granularities"
                + (", or pass emulate=True to have its operands rounded" if possible else ""),
            )
        rows = {alignment(side.granularity.name) for side in (recipe.wgrad.left, recipe.wgrad.right) if side.is_scaled}
        if len(rows) > 1:
            raise _refuse(
                f"recipe {recipe.name!r}, whose weight gradient reads {recipe.wgrad.left.granularity.name} and "
                f"{recipe.wgrad.right.granularity.name}, padded to different numbers of rows",
                "two operands of wgrad that are padded alike",
                "Give both operands of wgrad one granularity",
            )


def _is_delayed(side: OperandRecipe) -> bool:
    return side.rule == ScaleRule.DELAYED


def check_kernels(kernels: object) -> None:
    """`ConfigError` for a name that is no implementation."""
    if kernels is None or kernels in KERNELS:
        return
    hint = suggest(kernels, KERNELS) if isinstance(kernels, str) else ""
    allowed = f"None, {', '.join(map(repr, KERNELS))}"
    raise ConfigError(explain(f"kernels={kernels!r}", allowed, f"Use one of these.{hint}"))


def check_rules(plan: PrecisionPlan, found: Survey) -> None:
    """`PlanError` for a rule that matches nothing, or nothing that can be controlled."""
    for rule in plan.rules:
        if any(rule.matches(name) for name in found.units):
            continue
        for name, reason in found.uncontrollable.items():
            if rule.matches(name):
                raise _refuse(
                    f"rule {rule.pattern!r} -> {rule.recipe.name} covers only {name!r}, which has no precision of "
                    f"its own: {reason}",
                    f"units ({_list(found.units)})",
                    "Remove the rule, or name a unit",
                )
        for alias, name in found.aliases.items():
            if rule.matches(alias):
                raise _refuse(
                    f"rule {rule.pattern!r} -> {rule.recipe.name} names {alias!r}, the second name of {name!r}",
                    "the first name of each module",
                    f"Write the rule for {name!r}",
                )
    plan.check_names(found.names)


def check_parameters(model: nn.Module, plan: PrecisionPlan, found: Survey) -> None:
    """`PlanError` for parameters, or a unit's buffers, that are not stored as the plan needs them."""
    for name, module in model.named_modules():
        is_unit = name in found.units
        format = plan.recipe_for(name).region if is_unit else None
        for tensor_name, tensor, trained in _stored(module, buffers=is_unit):
            if _stored_right(tensor, format, trained=trained):
                continue
            path = f"{name}.{tensor_name}" if name else tensor_name
            raise _wrong_storage(path, tensor, format)


def _stored(module: nn.Module, *, buffers: bool) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, tensor, whether it is trained."""
    for name, parameter in module._parameters.items():  # noqa: SLF001
        if parameter is not None:
            yield name, parameter, parameter.requires_grad
    if buffers:
        for name, buffer in module._buffers.items():  # noqa: SLF001
            if buffer is not None:
                yield name, buffer, True  # running statistics are updated like parameters


def _stored_right(tensor: Tensor, format: str | None, *, trained: bool) -> bool:
    """Whether the tensor's type is one that a unit of `format` (None: not a unit) can work with."""
    if not tensor.is_floating_point():
        return True
    if tensor.dtype == torch.bfloat16 and (not trained or storage_of(tensor) is not None):
        return format in ("bf16", None)
    if format is None:
        return tensor.dtype not in _SIXTEEN_BITS
    return tensor.dtype is torch_dtype("fp64" if format == "fp64" else "fp32")


def _wrong_storage(path: str, tensor: Tensor, format: str | None) -> PlanError:
    dtype = tensor.dtype
    runs = "" if format is None else f" and its unit runs in {format}"
    if dtype in _SIXTEEN_BITS:
        stored = storage_of(tensor)
        return _refuse(
            f"{path!r} is stored in {format_of(dtype) if stored is None else stored}{runs}",
            "trained parameters and running statistics in fp32: they are the master weights, and small updates "
            "are lost in 16 bits; where the unit runs in bf16, also frozen parameters in bf16 and those that an "
            "optimizer of deepseek_mp.optim stores in it",
            "Call model.float() first; the plan casts what is multiplied"
            if stored is None
            else "Store it in fp32 first, which loses nothing: set_storage(optimizer, parameter, 'fp32')",
        )
    return _refuse(
        f"{path!r} is stored in {dtype}{runs}",
        "fp64 parameters for fp64 units and fp32 parameters for all others",
        "Convert the module with .double() or .float(), or change its rule",
    )


def check_fp32_arithmetic(plan: PrecisionPlan, found: Survey) -> None:
    """`PlanError` where FP32 products would need two settings: TF32 and HF32 are flags of the process."""
    reduced = sorted({recipe.region for recipe in _recipes(plan)}.intersection(_REDUCED_FP32))
    if not reduced:
        return
    if len(reduced) > 1:
        raise _refuse("a plan with both tf32 and hf32", "one of them", "Use the one that the device has")
    exact = [
        name
        for name, module in found.units.items()
        if multiplies(original_class(module)) and plan.recipe_for(name).region == "fp32"
    ]
    if plan.base.region == "fp32":
        exact = ["(base)", *exact]
    if exact:
        raise _refuse(
            f"a plan with {reduced[0]} beside fp32 in {_list(exact)}",
            f"either for everything that multiplies in FP32, since {reduced[0]} is a setting of the whole process",
            f"Give these layers {reduced[0]}, or replace {reduced[0]} by fp32 or bf16",
        )


def check_devices(
    plan: PrecisionPlan, devices: Sequence[Capabilities], *, emulate: bool, kernels: str | None
) -> frozenset[str]:
    """Names of the recipes that will be emulated; `FormatError` if a device cannot run one and may not emulate."""
    emulated = set()
    for recipe in dict.fromkeys(_recipes(plan)):
        for device in devices:
            if not recipe.is_plain and not has_products(recipe):
                _require_rounding(recipe, device, emulate=emulate)
                emulated.add(recipe.name)
                continue
            native = [_require(recipe, format, device, emulate=emulate) for format in sorted(formats_of(recipe))]
            if not all(native) or not _has_product(recipe, device, emulate=emulate, kernels=kernels):
                emulated.add(recipe.name)
    return frozenset(emulated)


def _has_product(recipe: Recipe, device: Capabilities, *, emulate: bool, kernels: str | None) -> bool:
    """Whether the device multiplies with the scales of the recipe, or the user chose what else does it."""
    if recipe.is_plain or kernels is not None or not products_of(recipe, device, None).is_emulated:
        return True
    if emulate:
        return False
    others = [
        name for name, other in RECIPES.items() if has_products(other) and formats_of(other) <= device.matmul_formats
    ]
    possible = [name for name in others if not products_of(RECIPES[name], device, None).is_emulated]
    raise FormatError(
        explain(
            f"recipe {recipe.name!r} has no kernel for its scales on {device.device_name} ({device.id})",
            f"recipes that have one: {', '.join(possible) or 'none'}",
            "Use one of these, or pass emulate=True to run it slowly in plain PyTorch",
        )
    )


def _require_rounding(recipe: Recipe, device: Capabilities, *, emulate: bool) -> None:
    """`FormatError` for a recipe that nothing multiplies in, unless its operands may be rounded on the device."""
    if emulate:
        _require(recipe, recipe.region, device, emulate=True)
        return
    raise FormatError(
        explain(
            f"recipe {recipe.name!r}, which this release multiplies nowhere, on {device.device_name} ({device.id})",
            "emulation of it: operands are rounded to its values and multiplied in a wider format",
            f"Use {nearest_recipe(recipe, device)!r}, the nearest it has, or pass emulate=True to run it slowly",
        )
    )


def _require(recipe: Recipe, format: str, device: Capabilities, *, emulate: bool) -> bool:
    """`Capabilities.require`; where a scaled recipe fails, the error speaks of recipes."""
    try:
        return device.require(format, emulate=emulate)
    except FormatError as error:
        if recipe.is_plain:
            raise
        possible = all(f in device.matmul_formats | device.emulated_formats for f in formats_of(recipe))
        change = f"Use {nearest_recipe(recipe, device)!r}, the nearest it has"
        if possible:
            change += ", or pass emulate=True to run it slowly without units for it"
        passed = f"recipe {recipe.name!r} needs {format}, which {device.device_name} ({device.id}) does not multiply"
        native = ", ".join(name for name in FORMATS if name in device.matmul_formats)
        raise FormatError(explain(passed, f"recipes of {native}", change)) from error


def _recipes(plan: PrecisionPlan) -> list[Recipe]:
    return [plan.base, *(rule.recipe for rule in plan.rules)]


def _is_sharded(kind: type) -> bool:
    """Whether the class is, or derives from, one of FSDP or DTensor; by name, so that neither is imported."""
    return any(base.__module__.startswith(_SHARDING) for base in kind.__mro__)


def _list(names: Iterable[str]) -> str:
    listed = [repr(name) for name in names]
    return ", ".join(listed[:6]) + (", ..." if len(listed) > 6 else "")


def _refuse(passed: str, allowed: str, change: str) -> PlanError:
    return PlanError(explain(passed, allowed, change))
