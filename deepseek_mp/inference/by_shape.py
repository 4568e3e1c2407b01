"""A model that is served in the form chosen for the size of each call's inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain
from typing import Any

from torch import nn

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.inference.arguments import Shapes, shapes_of
from deepseek_mp.inference.serve import Served


class ServedByShape(nn.Module):
    """Calls the form measured with inputs of the same shapes, or else of the nearest.

    Nearest are the shapes with the least sum of |log(size / measured size)| over all dimensions of all tensors; shapes
    of other numbers of tensors or dimensions are compared by their elements, and come after these.

    Args:
        served: forms by name.
        shapes: those each was measured with, by the same names.
    """

    def __init__(self, served: Mapping[str, Served], shapes: Mapping[str, Shapes]) -> None:
        super().__init__()
        self.names = tuple(served)
        self.forms = nn.ModuleList(served.values())
        self._served = tuple(served.values())
        self._shapes = tuple(shapes[name] for name in self.names)
        self._exact = {of: index for index, of in enumerate(self._shapes)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._served[self._index(args, kwargs)](*args, **kwargs)

    def name_for(self, *args: Any, **kwargs: Any) -> str:
        """The name of the form that a call with these arguments runs in."""
        return self.names[self._index(args, kwargs)]

    def train(self, mode: bool = True) -> ServedByShape:
        """Refused, as by `Served`."""
        if mode:
            passed = f"train() of a model served in {len(self.names)} forms"
            raise ConfigError(explain(passed, "inference", "Train the original model, and serve it again"))
        super().train(False)
        return self

    def _index(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        given = shapes_of(args, kwargs)
        exact = self._exact.get(given)
        if exact is not None:
            return exact
        return min(range(len(self._shapes)), key=lambda index: distance(given, self._shapes[index]))


def distance(given: Shapes, measured: Shapes) -> tuple[bool, float]:
    """How far shapes are from those that were measured; smaller is nearer."""
    if [len(shape) for shape in given] == [len(shape) for shape in measured]:
        pairs = zip(chain(*given), chain(*measured), strict=True)
        return False, math.fsum(abs(math.log(max(one, 1) / max(other, 1))) for one, other in pairs)
    one, other = (max(1, sum(map(math.prod, shapes))) for shapes in (given, measured))
    return True, abs(math.log(one / other))
