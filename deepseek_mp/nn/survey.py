"""Which modules of a model are units, and why the others that hold parameters are not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from deepseek_mp.nn.unit import is_known, original_class

_FUSED_ENCODER = "torch's fused TransformerEncoderLayer skips it in eval mode without gradients"
_LISTS = (nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class Survey:
    """The modules of a model that hold or use parameters, by name and in the model's order.

    A module with several names is listed once, under its first; `aliases` maps its other names to it.
    """

    units: dict[str, nn.Module] = field(default_factory=dict)
    uncontrollable: dict[str, str] = field(default_factory=dict)
    """Modules with parameters of their own that are no unit, and the reason."""
    notes: dict[str, str] = field(default_factory=dict)
    """What a reader of the plan should know about a unit."""
    aliases: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [*self.units, *self.uncontrollable]


def survey(model: nn.Module) -> Survey:
    """Sort the model's modules into units and not controllable ones."""
    found = Survey()
    bypassed, skipped_in_eval = _bypassed(model)
    first_names: dict[nn.Module, str] = {}
    parametrized: tuple[str, ...] = ()
    for name, module in model.named_modules(remove_duplicate=False):
        if module in first_names:
            found.aliases[name] = first_names[module]
            continue
        first_names[module] = name
        if name.startswith(parametrized):
            continue  # the tensors behind a parametrised module, listed under its own name
        if is_parametrized(module):
            parametrized += (f"{name}.parametrizations" if name else "parametrizations",)
        reason = bypassed.get(module) or _why_no_unit(module)
        if reason is None:
            found.units[name] = module
            if module in skipped_in_eval:
                found.notes[name] = _FUSED_ENCODER
        elif is_parametrized(module) or _holds_parameters(module):
            found.uncontrollable[name] = reason
    return found


def units(model: nn.Module) -> dict[str, nn.Module]:
    """The model's units by name, in its order; a module with several names once, under the first."""
    return survey(model).units


def uncontrollable(model: nn.Module) -> dict[str, str]:
    """Modules with parameters of their own whose precision no rule can set, and why."""
    return survey(model).uncontrollable


def _bypassed(model: nn.Module) -> tuple[dict[nn.Module, str], set[nn.Module]]:
    """Modules whose parent computes with their parameters: always (with the reason), or in eval mode."""
    always: dict[nn.Module, str] = {}
    in_eval: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            always[module.out_proj] = "MultiheadAttention uses its weight and never calls its forward"
        elif isinstance(module, nn.TransformerEncoderLayer):
            inner = {module.linear1, module.linear2, module.norm1, module.norm2}
            if module.training:
                in_eval |= inner
            else:
                always |= dict.fromkeys(inner, f"{_FUSED_ENCODER}; call model.train() before converting")
    return always, in_eval


def _why_no_unit(module: nn.Module) -> str | None:
    """Why the module itself cannot be a unit; None if it can."""
    kind = original_class(module)
    if is_parametrized(module):
        return "its weight is computed by torch.nn.utils.parametrize outside its forward"
    if isinstance(module, _LISTS):
        return f"{kind.__name__} holds parameters that another module computes with"
    if not is_known(kind):
        return f"{kind.__name__} is not a known kind of unit (deepseek_mp.nn.register_unit teaches one)"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object, so its class no longer decides what runs"
    hooked = next(_computed_by_hook(module), None)
    if hooked is not None:
        return f"its {hooked} is computed by a hook (weight_norm, spectral_norm, pruning) outside its forward"
    return None


def _computed_by_hook(module: nn.Module) -> Iterator[str]:
    """Names of plain tensors that stand where a parameter was; the parameter has a suffix now."""
    own = module._parameters  # noqa: SLF001
    for name, value in module.__dict__.items():
        if isinstance(value, Tensor) and (f"{name}_orig" in own or f"{name}_g" in own):
            yield name


def _holds_parameters(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())  # noqa: SLF001
