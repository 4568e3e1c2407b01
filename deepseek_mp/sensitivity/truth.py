"""The true change of the loss: units whose forward gives the output that a recipe would, in the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.precision import Recipe
from deepseek_mp.sensitivity.outputs import largest_of, output_in


@contextmanager
def outputs_in(recipes: Mapping[nn.Module, Recipe]) -> Iterator[None]:
    """Inside, the forward of each module gives its output in the recipe, emulated; for forwards without gradients."""
    handles = [module.register_forward_hook(_replacing(recipe), with_kwargs=True) for module, recipe in recipes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def losses_in(
    loss_of: Callable[[], Tensor], cases: Mapping[str, Mapping[nn.Module, Recipe]]
) -> tuple[float, dict[str, float]]:
    """The loss as it is, and by how much it changes in each case.

    `loss_of` runs the forward and gives the loss, the same every time: same batch, same random numbers.
    """
    plain = float(loss_of())
    changes = {}
    for name, recipes in cases.items():
        with outputs_in(recipes):
            changes[name] = float(loss_of()) - plain
    return plain, changes


def _replacing(recipe: Recipe) -> Callable[..., Tensor | None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor | None:
        given = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(output, Tensor) or not isinstance(given, Tensor) or not given.numel():
            return None
        floating = given.is_floating_point()
        x = given.float() if floating else given
        rows = x.reshape(-1, x.shape[-1]) if isinstance(module, nn.Linear) else x
        made = output_in(module, rows, recipe, largest_of(given if floating else given[:0]))
        return made.view(output.shape).to(output.dtype)

    return hook
