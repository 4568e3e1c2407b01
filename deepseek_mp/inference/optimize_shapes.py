"""`optimize_for_shapes`: the fastest form within the budget for each of several sizes of inputs, behind one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from deepseek_mp.costs.restore import random_states, set_random_states
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.inference.arguments import Shapes, arguments_of, shapes_of, undoing
from deepseek_mp.inference.by_shape import ServedByShape
from deepseek_mp.inference.card import Card, ServingPlan
from deepseek_mp.inference.optimize import optimize_for_inference
from deepseek_mp.inference.serve import Served
from deepseek_mp.inference.shared_weights import share_weights
from deepseek_mp.nn.nested import check_nesting


class OptimisedByShape(NamedTuple):
    """`model, plans, cards = optimize_for_shapes(...)`; plans and cards by the names of the inputs."""

    model: ServedByShape
    plans: dict[str, ServingPlan]
    cards: dict[str, Card]


def optimize_for_shapes(
    model: nn.Module, example_inputs: list[Any] | Mapping[str, Any], **options: Any
) -> OptimisedByShape:
    """A model that runs each call in the form that is fastest for inputs of its size, within the budget.

    `optimize_for_inference` is asked for each of the inputs, one after the other. Weights that several of the chosen
    forms keep alike are in memory once. A call of other shapes runs in the form of the nearest (`ServedByShape`).

    Args:
        model: as for `optimize_for_inference`.
        example_inputs: a list of inputs, or a mapping of names to them; each is what `optimize_for_inference` takes: a
            tensor, a tuple of positional or a mapping of keyword arguments. In a list they are named by the shape of
            their first tensor, as in '8x3x224x224', or by those of all where that is not enough.
        options: as for `optimize_for_inference`, for all of them.

    Returns:
        `model`, and the `plans` and `cards` of `optimize_for_inference` by the names of the inputs.

    Raises:
        ConfigError: no list and no mapping, an empty one, or two inputs of the same shapes; and what
            `optimize_for_inference` raises.
    """
    named, shapes = _named(example_inputs)
    served: dict[str, Served] = {}
    plans, cards = {}, {}
    for name, inputs in named.items():
        served[name], plans[name], cards[name] = optimize_for_inference(model, inputs, **options)
        if share_weights(served.values())[-1]:
            _warmed(served[name], inputs)
    return OptimisedByShape(ServedByShape(served, shapes), plans, cards)


def _named(example_inputs: Any) -> tuple[dict[str, Any], dict[str, Shapes]]:
    """The inputs and their shapes, by name."""
    if not isinstance(example_inputs, list | Mapping) or not example_inputs:
        empty = "an empty " if isinstance(example_inputs, list | Mapping) else "a "
        passed = f"{empty}{type(example_inputs).__name__} as example inputs"
        allowed = "a list of inputs, or a mapping of names to inputs, one or more"
        raise ConfigError(explain(passed, allowed, "Pass [inputs, ...], each a tensor, a tuple or a mapping"))
    check_nesting(example_inputs, "example inputs")
    values = list(example_inputs.values()) if isinstance(example_inputs, Mapping) else example_inputs
    shapes = [shapes_of(*arguments_of(inputs)) for inputs in values]
    if len(set(shapes)) < len(shapes):
        passed = f"two example inputs of the shapes {next(of for of in shapes if shapes.count(of) > 1)}"
        raise ConfigError(explain(passed, "inputs of different shapes", "Leave one of them out"))
    names = list(map(str, example_inputs)) if isinstance(example_inputs, Mapping) else _names(shapes)
    if len(set(names)) < len(names):
        passed = f"example inputs named {', '.join(names)}"
        raise ConfigError(explain(passed, "a name once", "Name them by different text"))
    return dict(zip(names, values, strict=True)), dict(zip(names, shapes, strict=True))


def _names(shapes: list[Shapes]) -> list[str]:
    first = ["x".join(map(str, of[0])) if of else "" for of in shapes]
    whole = [", ".join("x".join(map(str, shape)) for shape in of) for of in shapes]
    return first if len(set(first)) == len(first) else whole


def _warmed(served: Served, inputs: Any) -> None:
    """Its first call with other weights' memory is made here, since code may be compiled or recorded for it again."""
    (args, kwargs), undo = arguments_of(inputs), undoing(inputs)
    before = random_states(served.device)
    with served.kept_state():  # which copies no weights, as they are not written to
        served(*args, **kwargs)
    set_random_states(before, served.device)
    undo()
