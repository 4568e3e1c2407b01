"""`PrecisionProfiler`: which layers mind which precision, before training and without changing anything."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from deepseek_mp.backends import Capabilities, capabilities, math_mode
from deepseek_mp.backends.low_precision import formats_of
from deepseek_mp.costs.fingerprint import model_digest
from deepseek_mp.costs.restore import Snapshot, preserved
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.nn import unconverted
from deepseek_mp.nn.call import Call, LossFn, batch_size, move, parse_batch, run
from deepseek_mp.nn.survey import survey
from deepseek_mp.nn.unit import multiplies, original_class
from deepseek_mp.ops.dtypes import format_of
from deepseek_mp.ops.gradients import gradient_views
from deepseek_mp.precision import Recipe, find_recipe
from deepseek_mp.profiler.arguments import (
    check_batches,
    check_count,
    check_masters,
    check_model,
    check_unused,
    ordered_recipes,
)
from deepseek_mp.profiler.assemble import assemble, with_recommendations, with_verification, without_data
from deepseek_mp.profiler.first_batch import digest_of, seeded_loss
from deepseek_mp.profiler.layer_times import LayerCosts, layer_costs
from deepseek_mp.profiler.partial import Partial
from deepseek_mp.profiler.report import ProfileReport
from deepseek_mp.profiler.search import MetricReport, lowest_precision
from deepseek_mp.profiler.unit_profile import family_of, riskiest
from deepseek_mp.profiler.verification import true_changes
from deepseek_mp.sensitivity import Probe
from deepseek_mp.sensitivity.truth import outputs_in

RECIPES_ASKED = ("bf16", "fp16", "tensor", "row", "block")
"""What is profiled unless something else is asked for."""
BATCHES = 32
SAVE_EVERY = 8
VERIFY_BATCHES = 8
FORMATS_TRIED = ("fp32", "bf16", "fp16")
Progress = Callable[[str, float], None]
Metric = Callable[[nn.Module], float]


class PrecisionProfiler:
    """Analyses a model; afterwards it is exactly as before, with its gradients, buffers and random numbers.

    A `loss_fn` that is a module is, too.

    Args:
        model: in FP32; plans in force are set aside for the time of an analysis.
        loss_fn: (output, target) -> scalar; None: the model's own loss, or inferred, as `MixedPrecisionTrainer` does.
        recipes: names of recipes, or recipes with names, to profile besides the base; None: bf16, fp16 and the FP8
            recipes, emulated where the device lacks them. 'nvfp4' can be asked for.
        base: what a unit runs in for which nothing else is better; None: bf16 where the device has it, else fp32.
        seed: of the rows and items that are drawn.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        loss_fn: LossFn | None = None,
        recipes: Sequence[str | Recipe] | None = None,
        base: str | None = None,
        seed: int = 0,
    ) -> None:
        check_model(model)
        self.model = model
        self._loss_fn = loss_fn
        self._preserved = nn.ModuleList([model, loss_fn]) if isinstance(loss_fn, nn.Module) else model
        self._recipes = [find_recipe(recipe) for recipe in (RECIPES_ASKED if recipes is None else recipes)]
        self._seed = seed
        self._last_call: Call = Call(args=(), kwargs={}, target=None)
        self._found = survey(model)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._capabilities: Capabilities = capabilities(self._device)
        self._base = find_recipe(base or ("bf16" if "bf16" in self._capabilities.matmul_formats else "fp32"))
        if family_of(self._base.name) is not None and self._base not in self._recipes:
            self._recipes.insert(0, self._base)  # what runs in the base is not free either

    @overload
    def analyze(
        self,
        batches: Iterable[Any] | None = None,
        *,
        max_batches: int = ...,
        verify: int = ...,
        time_layers: bool = ...,
        resume: str | Path | None = ...,
        progress: Progress | None = ...,
    ) -> ProfileReport: ...

    @overload
    def analyze(
        self,
        *,
        metric: Metric,
        tolerance: float,
        formats: Sequence[str] = ...,
        parts: Sequence[str] | None = ...,
        progress: Progress | None = ...,
    ) -> MetricReport: ...

    def analyze(
        self,
        batches: Iterable[Any] | None = None,
        *,
        max_batches: int = BATCHES,
        verify: int = 0,
        time_layers: bool = True,
        resume: str | Path | None = None,
        progress: Progress | None = None,
        metric: Metric | None = None,
        tolerance: float | None = None,
        formats: Sequence[str] = FORMATS_TRIED,
        parts: Sequence[str] | None = None,
    ) -> ProfileReport | MetricReport:
        """What each recipe would do through each unit; with `metric`, what each part of the model can do with.

        Args:
            batches: as `MixedPrecisionTrainer.fit` takes them; None: weights and shapes only, which the report says.
            max_batches: as many are looked at. The loss becomes sure with few, its first-order part with many.
            verify: for that many units, the riskiest first, measure the true change of the loss too, on more batches.
            time_layers: time the units in the formats that the device multiplies, a few seconds.
            resume: a file that keeps what was measured; if it is there, its batches are passed over, and count also
                where they are more than `max_batches`. It is refused if it is of another model, other weights, recipes,
                loss or seed, or began with another batch.
            progress: called with what is being done and the share of it that is done.
            metric: instead of batches; runs the model, the same every time, and returns a number. The result is the
                lowest precision of each part, emulated, with which all together hold the metric.
            tolerance: largest relative error of the metric.
            formats: recipes to try for the metric, from the highest to the lowest; the highest is emulated, too,
                unless it is that of the parameters.
            parts: names of modules for the metric, each with all that is in it; None: each unit that multiplies.

        Raises:
            ConfigError: a model without units, no batch with a finite loss, a file of another profile, or trained
                parameters in 16 bits; a metric that is not a finite number, a tolerance that is not positive, formats
                out of order, or a part without units; arguments of the one question beside the other.
        """
        if not self._found.units:
            allowed = "a model with Linear, convolution, norm or embedding layers, or others taught by register_unit"
            raise ConfigError(explain("a model without units", allowed, "Profile a model that has some"))
        if metric is not None:
            of_loss = {"batches": batches is not None, "max_batches": max_batches != BATCHES, "verify": verify != 0}
            of_loss |= {"time_layers": not time_layers, "resume": resume is not None}
            check_unused(of_loss, "beside a metric")
            return self._on_metric(metric, tolerance, formats, parts, progress)
        of_metric = {"tolerance": tolerance is not None, "parts": parts is not None}
        check_unused(of_metric | {"formats": tuple(formats) != FORMATS_TRIED}, "without a metric")
        check_count("max_batches", max_batches, 1)
        check_count("verify", verify, 0)
        check_masters(self.model)
        if batches is None:
            return without_data(self._found, self._recipes, self._base)
        check_batches(batches)
        report = progress or (lambda text, share: None)
        iterator = iter(batches)
        with self._undisturbed():
            partial = self._measured(iterator, max_batches, resume, report)
            if not partial.counted:
                left_out = f": {'; '.join(partial.skipped)}" if partial.skipped else ""
                raise ConfigError(explain(f"no batch to profile{left_out}", "a finite loss", "Pass other batches"))
            costs = self._costs(report, time_layers)
            native = [r.name for r in self._recipes if formats_of(r) <= self._capabilities.matmul_formats]
            made = assemble(self._found, partial, self._recipes, self._base, costs, native=native)
            made = with_recommendations(made)
            return self._verified(made, iterator, verify, report) if verify else made

    def _on_metric(
        self,
        metric: Metric,
        tolerance: float | None,
        formats: Sequence[str],
        parts: Sequence[str] | None,
        progress: Progress | None,
    ) -> MetricReport:
        recipes, members = ordered_recipes(formats), self._parts(parts)
        if tolerance is None:
            raise ConfigError(
                explain("a metric without tolerance", "tolerance=1e-3 or the like", "Say what is allowed")
            )

        named = [module for modules in members.values() for module in modules]
        highest = [module for module in named if not _is_stored_in(module, formats[0])]

        def measure(assignment: Mapping[str, str]) -> float:
            lowered = dict.fromkeys(highest, recipes[formats[0]])
            for part, name in assignment.items():
                lowered |= dict.fromkeys(members[part], recipes[name])
            with outputs_in(lowered), torch.no_grad():
                return metric(self.model)

        with self._undisturbed():
            return lowest_precision(measure, list(members), tolerance=tolerance, formats=formats, progress=progress)

    def _parts(self, parts: Sequence[str] | None) -> dict[str, list[nn.Module]]:
        multiplying = {n: m for n, m in self._found.units.items() if multiplies(original_class(m))}
        if not multiplying:
            allowed = "a model with Linear or convolution layers, or others that multiply"
            raise ConfigError(explain("a model without units that multiply", allowed, "Profile another model"))
        if isinstance(parts, str):
            raise ConfigError(explain(f"parts={parts!r}", "a list of names of modules", f"Pass [{parts!r}]"))
        if parts is None:
            parts = list(multiplying)
        members = {
            part: [m for name, m in multiplying.items() if name == part or name.startswith(f"{part}.")]
            for part in parts
        }
        empty = [part for part, modules in members.items() if not modules]
        if empty or not members:
            allowed = f"names of modules with units in them, such as {', '.join(list(multiplying)[:4])}"
            raise ConfigError(explain(f"parts {empty or list(parts)} without units", allowed, "Correct the names"))
        return members

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        with (
            preserved(self._preserved, self._device),
            unconverted(self.model),
            math_mode(self._device, fp32="ieee", search=False),
        ):
            yield

    def _measured(
        self, iterator: Iterator[Any], max_batches: int, resume: str | Path | None, report: Progress
    ) -> Partial:
        """What the batches say, with what a file already held."""
        first = next(iterator, None)
        if first is None:
            return Partial()
        asked = {} if resume is None else self._asked(parse_batch(first))
        known = Partial() if resume is None else Partial.load(resume, asked)
        iterator = chain([first], iterator)
        for batch in islice(iterator, known.seen):
            self._last_call = parse_batch(batch)
        self._last_call = move(self._last_call, self._device)
        while known.seen < max_batches:
            probe = Probe(self._found.units, self._recipes, seed=self._seed + known.seen, frozen=True)
            skipped, seen = [], 0
            for batch in islice(iterator, min(SAVE_EVERY, max_batches - known.seen)):
                report("measuring what each precision does", (known.seen + seen) / max_batches)
                problem = self._look(probe, batch)
                if problem:
                    skipped.append(f"batch {known.seen + seen}: {problem}")
                seen += 1
            if not seen:
                break
            readings = probe.read()
            known = known.joined(
                Partial(
                    seen=seen,
                    counted=seen - len(skipped),
                    loss=probe.loss,
                    curvature=probe.curvature,
                    readings=readings,
                    unmeasured=probe.unmeasured,
                    skipped=tuple(skipped),
                )
            )
            if resume is not None:
                known.save(resume, asked)
        return known

    def _asked(self, first: Call) -> dict[str, Any]:
        """What a file that is resumed has to be of, before the first batch is looked at."""
        call = move(first, self._device)
        loss = seeded_loss(self._preserved, lambda: run(self.model, call, self._loss_fn).loss, self._device, self._seed)
        return {
            "model": model_digest(self.model),
            "recipes": [recipe.to_json() for recipe in self._recipes],
            "seed": self._seed,
            "first_batch": digest_of(first),
            "first_loss": loss if math.isfinite(loss) else str(loss),
        }

    def _look(self, probe: Probe, batch: Any) -> str | None:
        """Measure one batch; why it does not count, or None."""
        call = move(parse_batch(batch), self._device)
        if not batch_size(call):
            return "it has no samples"
        with torch.enable_grad(), probe.watching(call):
            found = run(self.model, call, self._loss_fn)
            if found.items == 0:  # whatever its loss is: 0 would lower the mean over batches
                return "none of its items counts"
            if not bool(torch.isfinite(found.loss)):
                return f"its loss is {float(found.loss.detach())}"
            probe.loss_is(found, self._loss_fn)
            found.loss.backward()
            finite = all(bool(torch.isfinite(part).all()) for part in gradient_views(self.model.parameters()))
            self._preserved.zero_grad(set_to_none=True)
            self._last_call = call
            if not finite:
                probe.discard()
                return "its gradients are not finite"
        return None

    def _costs(self, report: Progress, time_layers: bool) -> LayerCosts:
        def forward() -> Tensor:
            return run(self.model, self._last_call, self._loss_fn).loss

        return layer_costs(
            self.model,
            forward,
            [self._base, *self._recipes],
            self._capabilities,
            self._device,
            timed=time_layers,
            progress=lambda share: report("timing layers", share),
        )

    def _verified(self, made: ProfileReport, iterator: Iterator[Any], count: int, report: Progress) -> ProfileReport:
        names = riskiest(made, count)
        batches = list(islice(iterator, VERIFY_BATCHES))
        called = [move(parse_batch(batch), self._device) for batch in batches] or [self._last_call]
        report("verifying", 0.0)

        snapshot = Snapshot(self._preserved, self._device)

        def loss_of(call: Call) -> Callable[[], Tensor]:
            def loss() -> Tensor:
                snapshot.restore()  # dropout draws the same with and without the recipe
                return run(self.model, call, self._loss_fn).loss.detach()

            return loss

        changes = true_changes(
            [loss_of(call) for call in called],
            {name: self._found.units[name] for name in names},
            {name: list(made[name]["recipes"]) for name in names},
        )
        return with_verification(made, changes, held_out=bool(batches))


def _is_stored_in(module: nn.Module, format: str) -> bool:
    """Whether the module as it is computes in the format."""
    stored = next(module.parameters(), None)
    return stored is not None and format_of(stored.dtype) == format
