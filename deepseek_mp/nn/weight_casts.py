"""The weights of a model cast to its base format in one pass, and their gradients back to FP32 in one.

Autocast makes a kernel, and a node in the graph, for each weight and each bias, in every forward, and as many in
the backward. Here one autograd function casts all of them at once. It keeps nothing for its backward, so that where
several forwards use the same weights (gradient accumulation) one cast serves all of their backwards. Gradients of
the parameters arrive together, at the end of the backward, and until then they are held in the base format.

The layers find the casts only inside of `WeightCasts.lent`. Numbers are those of autocast with its cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from deepseek_mp.nn.lent_cast import Casts, InputCast, LentCast
from deepseek_mp.nn.unit import Unit
from deepseek_mp.precision import PrecisionPlan

_FORWARDS = {kind: kind.forward for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}
"""The kinds of layers that are lent casts, with the forwards that are known; who replaces one wants his own."""
LENT = "lent_cast"


class WeightCasts:
    """The casts of a model's trained FP32 weights, for its units in the base format that are linear or convolve.

    What is not trained is left to autocast, since that is what models write in their forward. A write through
    `weight.data` goes unseen as long as the casts are kept; another tensor assigned to it is seen.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model = model
        self._inputs, self._casts = InputCast(dtype), Casts()
        self._dtype = dtype
        self._units: list[tuple[Unit, LentCast]] = []
        self._sources: list[nn.Parameter] = []
        self._parameters: list[nn.Parameter] = []
        self._found_for: object = None
        self._mark: object = None

    @contextmanager
    def lent(self, plan: PrecisionPlan | None, mark: object = None) -> Iterator[None]:
        """Inside, the units use the casts. With a `mark` these are kept, and used again as long as it is equal.

        `plan` is the one in force: another one has other units in its base format.
        """
        if mark is None or mark != self._mark:
            self.drop()
            self._find(plan)
            self._cast()
            self._mark = mark
        for unit, cast in self._units:
            unit.__dict__[LENT] = cast
        try:
            yield
        finally:
            for unit, _ in self._units:
                unit.__dict__.pop(LENT, None)
            self._inputs.forget()
            if mark is None:
                self.drop()

    def forward_ended(self) -> None:
        """No layer of this forward will read the last input again."""
        self._inputs.forget()

    def drop(self) -> None:
        """Give the memory back."""
        self._mark = None
        self._casts.made = self._casts.values = ()

    def _cast(self) -> None:
        if self._sources:
            self._casts.versions = [source._version for source in self._sources]  # noqa: SLF001 - no public one
            self._casts.values = [source.detach() for source in self._sources]
            self._casts.made = _CastAll.apply(self._dtype, *self._sources)  # type: ignore[no-untyped-call]

    def _find(self, plan: PrecisionPlan | None) -> None:
        """Take up the units and their parameters, if those may have changed since they were last looked for."""
        trained = [_is_trained(parameter) for parameter in self._parameters]
        if self._found_for == (plan, trained) and not self._casts.outdated:
            return
        self._casts.outdated = False
        self._parameters = list(self._model.parameters())
        self._found_for = plan, [_is_trained(parameter) for parameter in self._parameters]
        places: dict[nn.Parameter, int] = {}
        self._units = []
        for unit in self._model.modules():
            if isinstance(unit, Unit) and _is_cast_whole(unit):
                weight, bias = unit._parameters.get("weight"), unit._parameters.get("bias")  # noqa: SLF001 - no hooks
                if weight is not None and _is_trained(weight):
                    self._units.append((unit, self._lent_to(unit, weight, bias, places)))
        self._sources = list(places)

    def _lent_to(
        self, unit: Unit, weight: nn.Parameter, bias: nn.Parameter | None, places: dict[nn.Parameter, int]
    ) -> LentCast:
        """What the unit is lent; parameters that are new get the next places."""
        weight_place = places.setdefault(weight, len(places))
        bias_place = None
        if bias is not None and _is_trained(bias):
            bias_place = places.setdefault(bias, len(places))
        inputs = self._inputs if unit.original_class is nn.Linear else None
        return LentCast(
            weight, bias, dtype=self._dtype, casts=self._casts, places=(weight_place, bias_place), inputs=inputs
        )


def _is_cast_whole(unit: Unit) -> bool:
    """Whether the unit's forward is the original one in the model's region, and reads its parameters by a cast."""
    precision = unit.unit_precision
    kind = unit.original_class
    known = kind in _FORWARDS and kind.forward is _FORWARDS[kind]
    return known and precision.region is None and precision.products is None and not precision.rounds


def _is_trained(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and parameter.dtype == torch.float32


class _CastAll(Function):
    """All tensors to one type, in their own memory formats; gradients back to FP32."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *sources: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # a layer that did not run has no gradient
        casts = [torch.empty_like(source, dtype=dtype) for source in sources]
        torch._foreach_copy_(casts, sources)
        return tuple(casts)

    @staticmethod
    def backward(_ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # someone will differentiate this too
            return None, *(None if grad is None else grad.float() for grad in grads)
        present = [grad for grad in grads if grad is not None]
        casts = [torch.empty_like(grad, dtype=torch.float32) for grad in present]
        if casts:
            torch._foreach_copy_(casts, present)
        if len(casts) == len(grads):
            return None, *casts
        made = iter(casts)
        return None, *(None if grad is None else next(made) for grad in grads)
