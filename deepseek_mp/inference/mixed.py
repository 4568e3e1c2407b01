"""Kinds of linear layers in the forms that are tried: which forms are worth building, and those with kinds by layer.

Layers are timed alone before the first form with kinds is built: code takes seconds to compile and to time, and layers
that are much slower are slower in any code. The kinds by layer are chosen when the other forms have been built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from deepseek_mp.errors import first_line
from deepseek_mp.inference.by_layer import Bench, by_layer
from deepseek_mp.inference.fidelity import Metric
from deepseek_mp.inference.form import Form
from deepseek_mp.inference.layer_errors import undone
from deepseek_mp.inference.layer_plan import LayerPlan
from deepseek_mp.inference.layer_savings import LayerSavings, layer_savings
from deepseek_mp.inference.linear_kinds import KINDS
from deepseek_mp.inference.quantised_linear import linear_layers
from deepseek_mp.inference.serve import NARROW, Served

HALF = 0.5
"""Of the time, for timing layers."""
SLOW = 1.5
"""Kinds whose layers take so many times as long as those in 16 bits are left to plain code. Compiled code joins their
layers and starts them early, which in a token of a 7B decoder (H200) gained 1.22 on 16 bits."""
HOPELESS = 4
"""Kinds whose error in plain code is so many times the budget are left to it: compiled code rounds at other places,
which makes less of a difference."""


class MixedForms:
    """Which forms with kinds of linear layers are built, and the kinds by layer, where the others have kinds.

    Args:
        model: the original; it is only read.
        others: the forms that there are anyway, FP32 as it is among them.
        call: gives the outputs of a form for the example inputs.
        metric: of outputs and reference.
        budget: the largest metric allowed.
        seconds: for choosing, half of it at most for the times of layers; 0 leaves it out, and builds all forms.
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
        self._found: LayerSavings | str | None = None
        self._model, self._call, self._metric = model, call, metric
        self._budget, self._seconds = budget, seconds
        self._with_kinds = [form for form in others if form.linear is not None]

    def needless(self, form: Form, served: Mapping[Form, Served], errors: Mapping[Form, float]) -> str:
        """Why the form need not be built; empty where it is to be tried, as plain code always is.

        Args:
            served: forms that run; those without kinds are among them.
            errors: of the forms that were built, to the reference.
        """
        plain = replace(form, compiled=False, graphed=False)
        if form.linear is None or form == plain or self._seconds == 0:
            return ""
        error = errors.get(plain, 0.0)
        if error > HOPELESS * self._budget:
            return f"not built: as plain code its error of {error:.3g} is far beyond the budget of {self._budget:g}"
        if KINDS[form.linear].rounds_inputs:  # compiled code may join the rounding to what is before
            return ""
        found = self._measured(served)
        share = 0.0 if isinstance(found, str) else found.share.get(form.linear, 0.0)
        return f"not built: its layers take {share:.3g} times as long as in 16 bits" if share > SLOW else ""

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
        savings = self._measured(served)
        if isinstance(savings, str):
            return LayerPlan(why=savings)
        try:
            left = self._seconds - savings.seconds
            return by_layer(self._bench(served), savings, budget=self._budget, seconds=left)
        except Exception as error:  # noqa: BLE001 - the other forms are there all the same; the plan says why
            return LayerPlan(why=f"not tried: {first_line(error)}")

    def _measured(self, served: Mapping[Form, Served]) -> LayerSavings | str:
        """What kinds save in layers, measured once; or why that cannot be."""
        if self._found is None:
            try:
                base, dtype = self._base(served)
                kinds = list(dict.fromkeys(form.linear for form in self._with_kinds if form.linear is not None))
                self._found = layer_savings(
                    base.model, lambda: self._call(base), kinds,
                    dtype=dtype, device=base.device, seconds=HALF * self._seconds,
                )  # fmt: skip
            except Exception as error:  # noqa: BLE001 - as above
                self._found = f"not tried: {first_line(error)}"
        return self._found

    def _base(self, served: Mapping[Form, Served]) -> tuple[Served, torch.dtype]:
        """In 16 bits; a copy that is not among those that run is not kept, since others are built after it."""
        plain = Form(format=self._with_kinds[0].format)
        return served.get(plain) or Served(self._model, plain, served[Form()].device), NARROW[plain.format]

    def _bench(self, served: Mapping[Form, Served]) -> Bench:
        wide, (base, dtype) = served[Form()], self._base(served)
        with undone(wide.model, wide.device):
            reference = self._call(wide)
        return Bench(
            model=self._model, base=base.model, call=lambda: self._call(base), reference=reference,
            metric=self._metric, dtype=dtype, device=wide.device,
        )  # fmt: skip

    def _one_for_all(self) -> str | None:
        """The kind that every layer has that can be of it."""
        kinds = {kind for _, kind in self.plan.kinds}
        if len(kinds) != 1:
            return None
        (kind,) = kinds
        return kind if {name for name, _ in self.plan.kinds} == set(linear_layers(self._model, kind)[0]) else None
