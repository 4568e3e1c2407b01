"""One sampled step: the layers whose turn it is, and the measuring of their tensors as they come by."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.monitor.measure import block, largest_magnitude
from deepseek_mp.monitor.module_calls import Look
from deepseek_mp.monitor.sides import Sides, in_use, sides_of
from deepseek_mp.monitor.store import TENSORS, Store
from deepseek_mp.monitor.subjects import Choice, Subject, activation_rows, is_plain, outputs_first, weight_rows
from deepseek_mp.nn.lazy import peeked
from deepseek_mp.nn.nested import tensors
from deepseek_mp.ops.own_work import own_work
from deepseek_mp.precision import Operand, Recipe
from deepseek_mp.precision.recipe import OperandRecipe

RanIn = Callable[[Subject, Recipe], None]
"""Told what a layer runs in before it is measured."""


class Turn:
    """Measures the first call of each of its layers in one step."""

    def __init__(
        self,
        subjects: Sequence[Subject],
        store: Store,
        asked: Mapping[str, Sides],
        choice: Choice,
        ran_in: RanIn,
    ) -> None:
        """`asked`: what tensors are rounded to beside what is in use, by name."""
        self.is_open = True
        self.backward_seen = False
        self._subjects = subjects
        self._store, self._asked, self._choice, self._ran_in = store, asked, choice, ran_in
        self._taken: set[int] = set()

    def looks(self) -> dict[nn.Module, Look]:
        """What is to look at each layer."""
        return {subject.module: self._look_at(subject) for subject in self._subjects}

    def _look_at(self, subject: Subject) -> Look:
        def look(args: Any, kwargs: Any, output: Any) -> None:
            if self.is_open and torch.is_grad_enabled() and subject.index not in self._taken:
                self._taken.add(subject.index)
                with own_work():
                    self._look(subject, (args, kwargs), output)

        return look

    def _look(self, subject: Subject, inputs: Any, output: Any) -> None:
        recipe = in_use(subject)
        self._ran_in(subject, recipe)
        used = sides_of(recipe)
        given = next((t for t in tensors(inputs) if t.is_floating_point()), None)
        if given is not None:
            self._activation(subject, given, Operand.INPUT, used)
        self._weight(subject, used)
        made = next((t for t in tensors(output) if t.requires_grad and t.is_floating_point()), None)
        if made is not None:
            made.register_hook(self._gradient_hook(subject, used))

    def _gradient_hook(self, subject: Subject, used: Sides) -> Callable[[Tensor], None]:
        measured = False

        def look(gradient: Tensor) -> None:
            nonlocal measured
            self.backward_seen = True
            if self.is_open and not measured:
                measured = True
                with own_work():
                    self._activation(subject, gradient, Operand.GRAD_OUTPUT, used)

        return look

    def _activation(self, subject: Subject, tensor: Tensor, operand: Operand, used: Sides) -> None:
        if not is_plain(tensor) or not tensor.numel():
            return
        values = peeked(tensor)
        rows = activation_rows(values, subject, self._choice)
        self._add(subject, operand, rows, values, used)

    def _weight(self, subject: Subject, used: Sides) -> None:
        weight = subject.weight.detach()
        sides = self._ways(Operand.WEIGHT, used)
        count = outputs_first(weight, subject).shape[0]
        # Rows that share a scale are looked at together.
        run = min(count, max((side.granularity.rows or 1 for side in sides if side.is_scaled), default=1))
        rows = weight_rows(weight, subject, self._choice.of(count, run=run), run)
        self._add(subject, Operand.WEIGHT, rows, weight, used)

    def _add(self, subject: Subject, operand: Operand, rows: Tensor, whole: Tensor, used: Sides) -> None:
        numbers = block(rows, self._ways(operand, used), lambda: largest_magnitude(whole))
        self._store.add(subject.index, TENSORS.index(operand.value), numbers)

    def _ways(self, operand: Operand, used: Sides) -> list[OperandRecipe]:
        return [used[operand], *(sides[operand] for sides in self._asked.values())]
