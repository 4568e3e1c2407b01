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

from deepseek_mp.nn.call import Call, LossFn, Result
from deepseek_mp.ops.statistics import ERROR_FIELDS, SPREAD_FIELDS
from deepseek_mp.precision import Recipe
from deepseek_mp.sensitivity.measure import (
    EFFECT_FIELDS,
    ENERGY_FIELDS,
    PRODUCT_OPERANDS,
    TENSORS,
    Seen,
    effect,
    energies,
    operand_errors,
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

    def add(self, other: _Sums) -> None:
        """Put another batch's sums on top."""
        for own, more in ((self.effects, other.effects), (self.errors, other.errors)):
            for name, value in more.items():
                _add_to(own, name, value)
        assert self.energies is not None
        assert other.energies is not None
        assert self.spreads is not None
        assert other.spreads is not None
        self.energies, self.spreads = self.energies + other.energies, self.spreads + other.spreads
        self.calls += other.calls
        self.batches += other.batches


class Probe:
    """Measures units during backwards that somebody else runs.

    Args:
        units: the modules to look at, by name.
        recipes: what is asked of each; those that mean nothing for a unit are left out.
        rows: rows of an input that are looked at, where each is a term of the loss of its own.
        items: items of the batch that are looked at, where it takes whole ones.
        seed: of the draws. The model's random numbers are not touched.
    """

    def __init__(
        self,
        units: Mapping[str, nn.Module],
        recipes: Sequence[Recipe],
        *,
        rows: int = ROWS,
        items: int = ITEMS,
        seed: int = 0,
    ) -> None:
        self.unmeasured: dict[str, str] = {}
        self._units: dict[str, nn.Module] = {}
        for name, module in units.items():
            reason = why_not_estimated(module)
            if reason is None:
                self._units[name] = module
            else:
                self.unmeasured[name] = reason
        self._recipes = {
            name: [recipe for recipe in recipes if can_estimate(module, recipe)] for name, module in self._units.items()
        }
        self._rows, self._items, self._seed = rows, items, seed
        self._generators: dict[torch.device, torch.Generator] = {}
        self._sums: dict[str, _Sums] = {}
        self._pending: dict[str, _Sums] = {}
        self._order: dict[str, int] = {}
        self._losses: list[Tensor] = []
        self._curvatures: list[Tensor] = []
        self._layout: BatchLayout | None = None
        self._terms: Terms | None = None
        self._batch = 0

    @contextmanager
    def watching(self, call: Call, names: Iterable[str] | None = None) -> Iterator[None]:
        """Look at the units (all, or those named) in the forward and backward made inside, for this call's batch.

        Tell `loss_is` between the two, and `discard` if the batch is not to count. Hooks are gone afterwards, also
        after an exception, and then the batch does not count.
        """
        self._layout, self._terms = BatchLayout.of(call), None
        self._pending = {}
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
            self._layout, self._terms, self._pending = None, None, {}
            self._batch += 1

    def loss_is(self, found: Result, loss_fn: LossFn | None) -> None:
        """The loss that the backward will start from; it is to be that of the mean, not scaled."""
        self._terms = Terms.of(found, loss_fn)

    def discard(self) -> None:
        """What the batch being watched gave does not count."""
        self._terms, self._pending = None, {}

    def _commit(self) -> None:
        if self._terms is None:
            return
        self._losses.append(self._terms.loss)
        self._curvatures.append(torch.as_tensor(self._terms.curvature, dtype=torch.float32))
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
                self.unmeasured[name] = NO_GRADIENT if name in self._order else NEVER_CALLED
            else:
                self.unmeasured.pop(name, None)
        measured = sorted(self._sums.items(), key=lambda item: item[1].order)
        return {name: _reading(sums) for name, sums in measured}

    def _forward_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._order.setdefault(name, len(self._order))
            if not (torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad):
                return
            given = args[0] if args else next(iter(kwargs.values()), None)
            if isinstance(given, Tensor) and given.numel() and output.numel():
                self._sample(name, module, given, output)

        return hook

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
        for recipe in recipes:
            _add_to(sums.effects, recipe.name, effect(module, recipe, exact, seen))
        for recipe, errors in zip(recipes, operand_errors(module, recipes, seen), strict=True):
            _add_to(sums.errors, recipe.name, errors)
        own, wide = energies(module, seen), spreads(module, seen)
        sums.energies = own if sums.energies is None else sums.energies + own
        sums.spreads = wide if sums.spreads is None else sums.spreads + wide
        sums.calls += 1

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]


def _some_items(given: Tensor, index: Tensor | None) -> Tensor:
    """Items of an input that is not floating, such as tokens; detached."""
    return given.detach() if index is None else given.detach().index_select(0, index)


def _add_to(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def _reading(sums: _Sums) -> UnitReading:
    assert sums.energies is not None
    assert sums.spreads is not None
    effects = {}
    for name, total in sums.effects.items():
        first, variance, second = (total / sums.batches).tolist()
        errors = (sums.errors[name] / sums.calls).tolist()
        effects[name] = Effect(
            first=first,
            standard_error=(variance / sums.batches) ** 0.5,
            second=second,
            errors={
                which: dict(zip(ERROR_FIELDS, values, strict=True))
                for which, values in zip(PRODUCT_OPERANDS, errors, strict=True)
            },
        )
    assert len(EFFECT_FIELDS) == total.numel()
    energy, row_energy = (sums.energies / sums.batches).tolist()
    assert len(ENERGY_FIELDS) == sums.energies.numel()
    wide = (sums.spreads / sums.calls).tolist()
    return UnitReading(
        order=sums.order,
        batches=sums.batches,
        calls=sums.calls,
        effects=effects,
        energy=energy,
        row_energy=row_energy,
        spreads={
            which: dict(zip(SPREAD_FIELDS, values, strict=True)) for which, values in zip(TENSORS, wide, strict=True)
        },
    )
