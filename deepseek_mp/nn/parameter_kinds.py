"""What a model's parameters are: weights, biases, norms or embeddings, and the format of the region that reads each."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from deepseek_mp.nn.survey import units
from deepseek_mp.nn.unit import original_class
from deepseek_mp.precision import PrecisionPlan

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_PLAINEST = ("weight", "bias", "norm", "embedding")
"""A parameter that is several of them counts as the last one: a head that is tied to an embedding is an embedding."""


@dataclass(frozen=True)
class ParameterKind:
    """One parameter, under its first name."""

    name: str
    kind: str
    """'weight', 'bias', 'norm' (any other vector, as a norm's scale) or 'embedding'."""
    read_as: str
    """Region of the unit that reads it, of the model around it if no unit does; of several the one that is not BF16."""


def parameter_kinds(model: nn.Module, plan: PrecisionPlan) -> dict[Tensor, ParameterKind]:
    """Every parameter of the model under a plan, in the model's order; tied ones once."""
    found: dict[Tensor, ParameterKind] = {}
    known = units(model)
    for path, module in model.named_modules():
        region = (plan.recipe_for(path) if path in known else plan.base).region
        for own_name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{own_name}" if path else own_name
            this = ParameterKind(name, _kind(module, own_name, parameter), region)
            before = found.get(parameter)
            found[parameter] = this if before is None else _both(before, this)
    return found


def _kind(module: nn.Module, name: str, parameter: Tensor) -> str:
    if issubclass(original_class(module), _EMBEDDINGS):
        return "embedding"
    if "bias" in name.split("_")[0]:  # recurrent layers number theirs
        return "bias"
    return "weight" if parameter.dim() > 1 else "norm"


def _both(first: ParameterKind, second: ParameterKind) -> ParameterKind:
    kind = max(first.kind, second.kind, key=_PLAINEST.index)
    return ParameterKind(first.name, kind, first.read_as if first.read_as != "bf16" else second.read_as)
