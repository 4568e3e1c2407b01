"""`Probe`: samples the units of a model during one forward and backward, and adds up what recipes would do.

Sums stay on the device until they are read. A unit's sample lives from its forward to its backward only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.nn.again import is_computed_again
from deepseek_mp.nn.call import Call, LossFn, Result
from deepseek_mp.ops.host_copy import HostCopy
from deepseek_mp.ops.statistics import SPREAD_FIELDS
from deepseek_mp.precision import Recipe
from deepseek_mp.sensitivity.measure import (
    AMAX,
    OPERAND_FIELDS,
    PRODUCT_OPERANDS,
    TENSORS,
    Operands,
    Seen,
    effect,
    energies,
    spreads,
)
from deepseek_mp.sensitivity.outputs import (
    can_estimate,
    exact_output,
    is_rowwise,
    largest_of,
    needs_whole_batch,
    why_not_estimated,
)
from deepseek_mp.sensitivity.reading import Effect, UnitReading
from deepseek_mp.sensitivity.sampling import BatchLayout, Terms, draw

ROWS = 1024
ITEMS = 16
NEVER_CALLED = "the model's forward never called it"
NO_GRADIENT = "the loss does not depend on its output"
NOT_FOLLOWED = "no gradient is computed for its output: nothing in it or before it is trained, or gradients are off"
NOT_ONE_TENSOR = "its input or its output is not one tensor with values"


@dataclass
class _Sums:
    """What one unit's batches add up to; tensors on the device."""

    order: int
    effects: dict[str, Tensor] = field(default_factory=dict)
    errors: dict[str, Tensor] = field(default_factory=dict)
    energies: Tensor | None = None
    spreads: Tensor | None = None
    calls: int = 0
    batches: int = 0

    def tensors(self) -> list[Tensor]:
        """Effects and errors of each recipe, then energies and spreads."""
        assert self.energies is not None
        assert self.spreads is not None
        by_recipe = [tensor for name in self.effects for tensor in (self.effects[name], self.errors[name])]
        return [*by_recipe, self.energies, self.spreads]

    def add(self, other: _Sums) -> None:
        """Put another batch's sums on top."""
        for own, more in ((self.effects, other.effects), (self.errors, other.errors)):
            for name, value in more.items():
                _add_to(own, name, value)
        assert self.energies is not None
        assert other.energies is not None
        assert other.spreads is not None
        self.energies = self.energies + other.energies
        self.spreads = _with_spreads(self.spreads, other.spreads)
        self.calls += other.calls
        self.batches += other.batches


class Probe:
    """Measures units during backwards that somebody else runs.

    Args:
        units: the modules to look at, by name.
        recipes: what is asked of each, or of each by name; those that mean nothing for a unit are left out.
        rows: rows of an input that are looked at, where each is a term of the loss of its own.
        items: items of the batch that are looked at, where it takes whole ones.
        seed: of the draws. The model's random numbers are not touched.
        both_ways: round input and weight along the sums of all products, not of fprop only; twice the work.
        frozen: look also at units that nothing is trained in or before: a gradient of their outputs is computed.
    """

    def __init__(
        self,
        units: Mapping[str, nn.Module],
        recipes: Sequence[Recipe] | Mapping[str, Sequence[Recipe]],
        *,
        rows: int = ROWS,
        items: int = ITEMS,
        seed: int = 0,
        both_ways: bool = True,
        frozen: bool = False,
    ) -> None:
        self.unmeasured: dict[str, str] = {}
        self._units: dict[str, nn.Module] = {}
        for name, module in units.items():
            reason = why_not_estimated(module)
            if reason is None:
                self._units[name] = module
            else:
                self.unmeasured[name] = reason
        asked = recipes if isinstance(recipes, Mapping) else dict.fromkeys(self._units, recipes)
        self._recipes = {
            name: [recipe for recipe in asked[name] if can_estimate(module, recipe)]
            for name, module in self._units.items()
        }
        self._both_ways, self._frozen = both_ways, frozen
        self._rows, self._items, self._seed = rows, items, seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._sums: dict[str, _Sums] = {}
        self._pending: dict[str, _Sums] = {}
        self._order: dict[str, int] = {}
        self._unseen: dict[str, str] = {}
        self._losses: list[Tensor] = []
        self._curvatures: list[Tensor] = []
        self._layout: BatchLayout | None = None
        self._terms: Terms | None = None
        self._batch = 0
        self._outputs: list[Tensor] = []

    @contextmanager
    def watching(self, call: Call, names: Iterable[str] | None = None) -> Iterator[None]:
        """Look at the units (all, or those named) in the forward and backward made inside, for this call's batch.

        Tell `loss_is` between the two, and `discard` if the batch is not to count. Hooks are gone afterwards, also
        after an exception, and then the batch does not count.
        """
        self._layout, self._terms = BatchLayout.of(call), None
        self._pending, self._outputs = {}, []
        chosen = self._units if names is None else {name: self._units[name] for name in names if name in self._units}
        handles = [
            module.register_forward_hook(self._forward_hook(name), with_kwargs=True) for name, module in chosen.items()
        ]
        try:
            yield
            self._commit()
        finally:
            for handle in handles:
                handle.remove()
            self._layout, self._terms, self._pending, self._outputs = None, None, {}, []
            self._batch += 1

    def loss_is(self, found: Result, loss_fn: LossFn | None) -> None:
        """The loss that the backward will start from; it is to be that of the mean, not scaled."""
        self._terms = Terms.of(found, loss_fn)

    def backward(self, loss: Tensor) -> None:
        """The backward of the loss as far as the units watched need it: no parameter gets a gradient.

        It goes down to the outputs of the units watched. One that comes first and is overwritten in place is not seen.
        """
        if self._outputs:
            torch.autograd.grad(loss, self._outputs, allow_unused=True)

    def discard(self) -> None:
        """What the batch being watched gave does not count."""
        self._terms, self._pending = None, {}

    def _commit(self) -> None:
        if self._terms is None:
            return
        self._losses.append(self._terms.loss)
        curvature = self._terms.curvature  # a number is filled in on the device: copying it there would wait
        if not isinstance(curvature, Tensor):
            curvature = torch.full_like(self._terms.loss, curvature)
        self._curvatures.append(curvature)
        for name, found in self._pending.items():
            found.batches = 1
            if name in self._sums:
                self._sums[name].add(found)
            else:
                self._sums[name] = found

    @property
    def loss(self) -> float:
        """The mean of the losses seen; 0 before the first. Waits for the device."""
        return float(torch.stack(self._losses).mean()) if self._losses else 0.0

    @property
    def curvature(self) -> float:
        """The mean curvature of the losses seen, as `sampling.Terms` has it. Waits for the device."""
        return float(torch.stack(self._curvatures).mean()) if self._curvatures else 1.0

    def read(self) -> dict[str, UnitReading]:
        """What was measured so far, by unit, in the order of their calls. Waits for the device.

        `unmeasured` then says of every other unit why there is nothing.
        """
        for name in self._units:
            if name not in self._sums:
                self.unmeasured[name] = self._unseen.get(name, NO_GRADIENT) if name in self._order else NEVER_CALLED
            else:
                self.unmeasured.pop(name, None)
        return self.send().read().readings

    def send(self) -> Sent:
        """What was measured so far, on its way to the host; further batches are not part of it."""
        return Sent(self._sums, self._losses, self._curvatures)

    def _forward_hook(self, name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._frozen and torch.is_grad_enabled():
                output = _followed(output)  # also where it is computed again: the same has to be saved
            if not is_computed_again():
                self._look(name, module, args[0] if args else next(iter(kwargs.values()), None), output)
            return output

        return hook

    def _look(self, name: str, module: nn.Module, given: Any, output: Any) -> None:
        """Sample a call of the unit, or note why not."""
        self._order.setdefault(name, len(self._order))
        if not all(isinstance(tensor, Tensor) and tensor.numel() for tensor in (given, output)):
            self._unseen[name] = NOT_ONE_TENSOR
        elif not (torch.is_grad_enabled() and output.requires_grad):
            self._unseen[name] = NOT_FOLLOWED
        else:
            self._outputs.append(output)
            self._sample(name, module, given, output)

    def _sample(self, name: str, module: nn.Module, given: Tensor, output: Tensor) -> None:
        assert self._layout is not None
        sample = draw(
            output,
            self._layout,
            rows=self._rows,
            items=self._items,
            rowwise=is_rowwise(module),
            whole=needs_whole_batch(module),
            generator=self._generator(output.device),
        )
        x = sample.of(given) if given.is_floating_point() else _some_items(given, sample.index)
        largest = largest_of(given if given.is_floating_point() else given[:0])
        order, batch = self._order[name], self._batch

        def measure(gradient: Tensor) -> None:
            terms = self._terms
            if terms is not None and batch == self._batch:
                seen = Seen(
                    x=x,
                    g=sample.of(gradient),
                    largest_x=largest,
                    largest_g=largest_of(gradient),
                    sample=sample,
                    terms=terms,
                )
                self._add(self._pending.setdefault(name, _Sums(order=order)), name, module, seen)

        output.register_hook(measure)

    def _add(self, sums: _Sums, name: str, module: nn.Module, seen: Seen) -> None:
        recipes = self._recipes[name]
        exact = exact_output(module, seen.x)
        operands = Operands(module, seen, both_ways=self._both_ways)
        for recipe, errors in zip(recipes, operands.errors(recipes), strict=True):
            _add_to(sums.effects, recipe.name, effect(module, recipe, exact, seen, operands))
            _add_to(sums.errors, recipe.name, errors)
        own, wide = energies(module, seen), spreads(module, seen)
        sums.energies = own if sums.energies is None else sums.energies + own
        sums.spreads = _with_spreads(sums.spreads, wide)
        sums.calls += 1

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def _followed(output: Any) -> Any:
    """The output, with a gradient where it had none; a copy then, so that it may be overwritten in place."""
    if not isinstance(output, Tensor) or output.requires_grad or not output.is_floating_point():
        return output
    return output.detach().requires_grad_().clone()


def _some_items(given: Tensor, index: Tensor | None) -> Tensor:
    """Items of an input that is not floating, such as tokens; detached."""
    return given.detach() if index is None else given.detach().index_select(0, index)


def _add_to(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _with_spreads(sums: Tensor | None, more: Tensor) -> Tensor:
    """The sums of spreads [3, 6] with more of them on top; of the largest magnitudes the largest."""
    if sums is None:
        return more
    both = sums + more
    both[:, AMAX] = torch.maximum(sums[:, AMAX], more[:, AMAX])
    return both


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a probe measured, on the host."""

    readings: dict[str, UnitReading]
    loss: float
    """The mean of the losses seen; 0 without any."""
    curvature: float

    def to_json(self) -> dict[str, Any]:
        readings = {name: reading.to_json() for name, reading in self.readings.items()}
        return {"readings": readings, "loss": self.loss, "curvature": self.curvature}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Measured:
        readings = {name: UnitReading.from_json(value) for name, value in data["readings"].items()}
        return cls(readings=readings, loss=data["loss"], curvature=data["curvature"])


@dataclass(frozen=True)
class Arrived:
    """Measurements that are on the host already, in the place of `Sent`."""

    measured: Measured
    ready: bool = True

    def read(self) -> Measured:
        return self.measured


class Sent:
    """What a probe had measured at one moment, on its way to the host."""

    def __init__(self, sums: Mapping[str, _Sums], losses: Sequence[Tensor], curvatures: Sequence[Tensor]) -> None:
        self._units = [
            (name, found.order, found.calls, found.batches, tuple(found.effects))
            for name, found in sorted(sums.items(), key=lambda item: item[1].order)
        ]
        tensors: list[Tensor] = []
        for name, *_ in self._units:
            tensors += sums[name].tensors()
        if losses:
            tensors += [
                torch.stack(list(losses)).mean(),
                torch.stack(list(curvatures)).mean(),
            ]
        self._has_loss = bool(losses)
        self._copy = HostCopy(tensors, mean=True)

    @property
    def ready(self) -> bool:
        """Whether `read` would not wait."""
        return self._copy.ready

    def read(self) -> Measured:
        """The measurements; waits for the device."""
        tensors = iter(self._copy.tensors())
        readings = {
            name: _reading(
                order, calls, batches, {recipe: (next(tensors), next(tensors)) for recipe in recipes}, tensors
            )
            for name, order, calls, batches, recipes in self._units
        }
        loss, curvature = (float(next(tensors)), float(next(tensors))) if self._has_loss else (0.0, 1.0)
        return Measured(readings=readings, loss=loss, curvature=curvature)


def _reading(
    order: int, calls: int, batches: int, by_recipe: Mapping[str, tuple[Tensor, Tensor]], rest: Iterator[Tensor]
) -> UnitReading:
    """A unit's reading of its effects and errors by recipe; its energies and spreads are next in `rest`."""
    effects = {}
    for name, (effects_sum, errors_sum) in by_recipe.items():
        first, variance, second = (effects_sum / batches).tolist()
        errors = (errors_sum / calls).tolist()
        effects[name] = Effect(
            first=first,
            standard_error=(variance / batches) ** 0.5,
            second=second,
            errors={
                which: dict(zip(OPERAND_FIELDS, values, strict=True))
                for which, values in zip(PRODUCT_OPERANDS, errors, strict=True)
            },
        )
    energy, row_energy = (next(rest) / batches).tolist()
    summed = next(rest)
    wide = summed / calls
    wide[:, AMAX] = summed[:, AMAX]
    return UnitReading(
        order=order,
        batches=batches,
        calls=calls,
        effects=effects,
        energy=energy,
        row_energy=row_energy,
        spreads={
            which: dict(zip(SPREAD_FIELDS, values, strict=True))
            for which, values in zip(TENSORS, wide.tolist(), strict=True)
        },
    )
