"""The forms in which each linear layer has a kind of its own, chosen when the other forms have been built."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from deepseek_mp.inference.by_layer import Bench, by_layer
from deepseek_mp.inference.fidelity import Metric
from deepseek_mp.inference.form import Form
from deepseek_mp.inference.layer_errors import undone
from deepseek_mp.inference.layer_plan import LayerPlan
from deepseek_mp.inference.quantised_linear import linear_layers
from deepseek_mp.inference.serve import NARROW, Served


class MixedForms:
    """Chooses kinds by layer, where the other forms have kinds of linear layers.

    Args:
        model: the original; it is only read.
        others: the forms that there are anyway, FP32 as it is among them.
        call: gives the outputs of a form for the example inputs.
        metric: of outputs and reference.
        budget: the largest metric allowed.
        seconds: for choosing; 0 leaves it out.
    """

    def __init__(
        self,
        model: nn.Module,
        others: list[Form],
        call: Callable[[Served], Any],
        metric: Metric,
        budget: float,
        seconds: float,
    ) -> None:
        self.others = others
        self.plan = LayerPlan(why="not tried: no time was given to it")
        """What was decided, and why."""
        self._model, self._call, self._metric = model, call, metric
        self._budget, self._seconds = budget, seconds
        self._with_kinds = [form for form in others if form.linear is not None]

    def forms(self, served: Mapping[Form, Served]) -> list[Form]:
        """The forms with kinds by layer, compiled as the others are; none where `plan.why` says why.

        Args:
            served: the other forms that run.
        """
        if not self._with_kinds:
            self.plan = LayerPlan(why="not tried: the model and the device have no kinds of linear layers")
            return []
        if self._seconds == 0:
            return []
        self.plan = self._chosen(served)
        same = self._one_for_all()
        if same is not None:
            self.plan = replace(self.plan, why=f"{same} for all, a form of its own; {self.plan.why}")
        if same is not None or not self.plan.kinds:
            return []
        return list(dict.fromkeys(replace(form, linear=None, layers=self.plan.kinds) for form in self._with_kinds))

    def _chosen(self, served: Mapping[Form, Served]) -> LayerPlan:
        kinds = list(dict.fromkeys(form.linear for form in self._with_kinds if form.linear is not None))
        plain = Form(format=self._with_kinds[0].format)
        wide = served[Form()]
        try:
            base = served.get(plain) or Served(self._model, plain, wide.device)
            with undone(wide.model, wide.device):
                reference = self._call(wide)
            bench = Bench(
                model=self._model, base=base.model, call=lambda: self._call(base), reference=reference,
                metric=self._metric, dtype=NARROW[plain.format], device=wide.device,
            )  # fmt: skip
            return by_layer(bench, kinds, budget=self._budget, seconds=self._seconds)
        except Exception as error:  # noqa: BLE001 - the other forms are there all the same; the plan says why
            return LayerPlan(why=f"not tried: {type(error).__name__}: {error}".splitlines()[0][:200])

    def _one_for_all(self) -> str | None:
        """The kind that every layer has that can be of it."""
        kinds = {kind for _, kind in self.plan.kinds}
        if len(kinds) != 1:
            return None
        (kind,) = kinds
        return kind if {name for name, _ in self.plan.kinds} == set(linear_layers(self._model, kind)[0]) else None
