"""Where modules stand in a model: one may be there under several names, and is replaced under all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

Place = tuple[nn.Module, str]
"""A parent, and the name of its child."""


def places_of(model: nn.Module, names: Iterable[str]) -> dict[str, list[Place]]:
    """All places of the modules of those names, which are in the model."""
    modules = {name: model.get_submodule(name) for name in names}
    found: dict[int, list[Place]] = {id(module): [] for module in modules.values()}
    for parent in model.modules():  # once: a mixture of experts has thousands of layers
        for place, child in parent._modules.items():  # noqa: SLF001
            if id(child) in found:
                found[id(child)].append((parent, place))
    return {name: found[id(module)] for name, module in modules.items()}


def put(places: list[Place], module: nn.Module) -> None:
    """Let the module stand in these places."""
    for parent, place in places:
        setattr(parent, place, module)


def replaced(model: nn.Module, made: Mapping[str, nn.Module]) -> nn.Module:
    """The model with other modules in the places of those named, in place; the one for the empty name is the model."""
    if "" in made:
        return made[""]
    for name, places in places_of(model, made).items():
        put(places, made[name])
    return model


def owners(model: nn.Module) -> Counter[int]:
    """By the id of each parameter, how many modules have it; one under several names counts once."""
    own = (module.named_parameters(recurse=False, remove_duplicate=False) for module in model.modules())
    return Counter(id(parameter) for named in own for _, parameter in named)
