"""Where modules stand in a model: one may be there under several names, and is replaced under all of them."""

from __future__ import annotations

from collections import Counter

from torch import nn

Place = tuple[nn.Module, str]
"""A parent, and the name of its child."""


def places_of(model: nn.Module, name: str) -> list[Place]:
    """All places of the module of that name, which is in the model."""
    module = model.get_submodule(name)
    children = ((parent, place) for parent in model.modules() for place in parent._modules)  # noqa: SLF001
    return [(parent, place) for parent, place in children if parent._modules[place] is module]  # noqa: SLF001


def put(places: list[Place], module: nn.Module) -> None:
    """Let the module stand in these places."""
    for parent, place in places:
        setattr(parent, place, module)


def replaced(model: nn.Module, name: str, made: nn.Module) -> nn.Module:
    """The model with another module in the places of the named one, in place; the module itself for the empty name."""
    if not name:
        return made
    put(places_of(model, name), made)
    return model


def owners(model: nn.Module) -> Counter[int]:
    """By the id of each parameter, how many modules have it; one under several names counts once."""
    own = (module.named_parameters(recurse=False, remove_duplicate=False) for module in model.modules())
    return Counter(id(parameter) for named in own for _, parameter in named)
