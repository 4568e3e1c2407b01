"""Chooses the plan of `precision_mode='auto'`: measure on this device, keep the fastest, say why.

1. One forward in FP32 and one in a 16-bit region: which units are called, with what, and whether the
   loss is finite (`costs.units`).
2. The units, each timed alone in every admissible format and memory format, within a few seconds
   (`costs.layers`). Where the device multiplies FP8, linear layers and 1x1 convolutions in its recipe too: a
   candidate of those layers in FP8 that gain by it joins the others, in the memory format in which it is fastest.
3. Whole steps, forward and backward, of the two best by layers and of FP32 (`costs.whole_step`);
   `costs.decide` says which comes next and which wins.

Everything is put back afterwards, and the result is kept in the cost cache, so that the same model
with the same inputs on the same machine is measured once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.backends import Capabilities, fp8_recipe
from deepseek_mp.backends.low_precision import formats_of
from deepseek_mp.costs.cache import CostCache
from deepseek_mp.costs.decide import (
    PREFERENCE,
    Candidate,
    Failure,
    Trial,
    Verdict,
    decide,
    expected_seconds,
    next_trial,
)
from deepseek_mp.costs.fingerprint import environment, first_inputs, model_digest
from deepseek_mp.costs.layers import LayerTimes, measure_layers
from deepseek_mp.costs.restore import preserved
from deepseek_mp.costs.whole_step import Recording, Stage
from deepseek_mp.errors import PlanError
from deepseek_mp.nn import unconverted
from deepseek_mp.nn.assign import output_layer, products_of
from deepseek_mp.nn.survey import survey
from deepseek_mp.precision import RECIPES, Decision, PrecisionPlan, Reason, Recipe
from deepseek_mp.precision.planning import PAYS

TOTAL_S = 40.0
COMPILED_TOTAL_S = 160.0
"""A further trial is started only if it is expected to end within this time from the beginning. A
compiled trial is mostly compilation, and that of the winner is work that training would do anyway."""
LAYERS_S = {"cpu": 3.0}
STEP_S = {"cpu": 0.3}
"""Seconds for all layers, and for one whole step after its first calls; others get the next two."""
LAYERS_DEFAULT_S = 6.0
STEP_DEFAULT_S = 1.0

Progress = Callable[[str, float], None]


def choose_plan(
    model: nn.Module,
    run: Callable[[], Tensor],
    *,
    device: torch.device,
    capabilities: Capabilities,
    pins: Mapping[str, str | Recipe],
    compiled: bool,
    cache: CostCache,
    emulate: bool = False,
    kernels: str | None = None,
    progress: Progress | None = None,
) -> PrecisionPlan:
    """The fastest plan for this model, these inputs and this device, never one that loses to FP32.

    `run` computes the scalar loss of a sample batch, with the model in train mode and without an
    autocast region of its own; it is called some tens of times. `pins` are put before all rules;
    `emulate` allows them a format that the device lacks, `kernels` names what runs their FP8. `compiled`
    says that `run` calls compiled code: whole steps are then timed compiled, since a compiler fuses what
    lies between the layers and can turn the order of two formats around. `progress` is told what is being
    done and the share of the work that lies behind.

    The plan's decision for the whole model (layer '') holds the trials in milliseconds; each layer
    that was timed has one too. Errors of the model in FP32 propagate; `PlanError` if the model takes
    no candidate's plan. Afterwards the model is as it was.
    """
    formats = sorted({"fp32", *capabilities.admissible()}.intersection(PREFERENCE), key=PREFERENCE.index)
    if formats == ["fp32"]:
        return _only_fp32(pins, capabilities)
    report = progress or (lambda text, fraction: None)
    with preserved(model, device) as snapshot, unconverted(model):
        stage = Stage(
            model=model,
            run=run,
            device=device,
            capabilities=capabilities,
            pins=pins,
            emulate=emulate,
            kernels=kernels,
            snapshot=snapshot,
        )
        candidates, refused = stage.candidates(formats)
        scaled = _scaled(candidates, capabilities, kernels)
        key = {
            **environment(device, capabilities),
            "candidates": [candidate.key for candidate in (*candidates, *scaled)],
            "pins": PrecisionPlan.of("fp32", pins).to_json()["rules"],
            "kernels": kernels,
            "model": model_digest(model),
            "inputs": first_inputs(model, stage.run_eagerly),
            "compiled": compiled,
        }
        known = _cached(cache, key)
        if known is not None:
            report("taken from the cache", 1.0)
            return known
        notes: dict[str, Any] = {"refused": refused} if refused else {}
        if compiled:
            notes["compiled"] = "whole steps were timed compiled, layers alone were not"
        total_s = COMPILED_TOTAL_S if compiled else TOTAL_S
        plan, lasting = _measure(stage, candidates, scaled, cache, report, notes, total_s=total_s)
    if lasting:
        cache.put(key, plan.to_json())
    cache.save()
    return plan


def _measure(
    stage: Stage,
    candidates: list[Candidate],
    scaled: Mapping[Candidate, Candidate],
    cache: CostCache,
    report: Progress,
    notes: Mapping[str, Any],
    *,
    total_s: float,
) -> tuple[PrecisionPlan, bool]:
    """The plan, and whether it may be kept: not where it hangs on free memory or on the weights' values."""
    started = time.perf_counter()
    report("recording the layers", 0.0)
    recording = stage.record(candidates)
    layers = measure_layers(
        recording.calls,
        [candidate for candidate in (*candidates, *scaled) if candidate.format not in recording.failed],
        device=stage.device,
        budget_s=LAYERS_S.get(stage.device.type, LAYERS_DEFAULT_S),
        cache=cache,
        environment=environment(stage.device, stage.capabilities),
        kernels=stage.kernels,
        exclude=lambda name: PrecisionPlan.of("fp32", stage.pins).rule_for(name) is not None,
        progress=lambda fraction: report("timing layers", 0.05 + 0.35 * fraction),
    )
    trials = {candidate: _first_trial(candidate, recording, layers) for candidate in candidates}
    output = output_layer(stage.model, survey(stage.model))
    mixed = [found for pair in scaled.items() if (found := layers.mixed(*pair, output=output)) is not None]
    if mixed:  # one only, so that the second best by layers is what it has to beat
        best, layers_ms = min(mixed, key=lambda found: found[1])
        trials[best] = Trial(candidate=best, layers_ms=layers_ms)
    deadline = started + total_s
    stopped = _step_trials(stage, trials, layers.coverage, recording.finite, deadline, report)
    verdict = decide(trials.values(), plain=_plain(trials))
    evidence = {
        **_evidence(verdict, trials.values(), layers),
        **notes,
        **({"stopped": f"no further trial fits into {total_s:g} s"} if stopped else {}),
        "seconds": round(time.perf_counter() - started, 3),
    }
    report(f"chosen: {verdict.candidate.key}", 1.0)
    lasting = all(trial.failure in (None, Failure.ERROR) for trial in trials.values())
    return _as_plan(stage.plan(verdict.candidate), verdict, evidence, layers), lasting


def scaled_recipe(capabilities: Capabilities, kernels: str | None) -> Recipe | None:
    """The device's FP8 recipe, if it multiplies in that by itself."""
    recipe = fp8_recipe(capabilities)
    if RECIPES.get(recipe.name) != recipe or not formats_of(recipe) <= capabilities.matmul_formats:
        return None
    if kernels is None and products_of(recipe, capabilities, None).is_emulated:
        return None
    return recipe


def _scaled(candidates: list[Candidate], capabilities: Capabilities, kernels: str | None) -> dict[Candidate, Candidate]:
    """The device's FP8 recipe, if there is one to time, by memory format, with the plain candidate of the same."""
    recipe = scaled_recipe(capabilities, kernels)
    if recipe is None:
        return {}
    plain = [candidate for candidate in candidates if candidate.format == recipe.region]
    return {replace(candidate, format=recipe.name): candidate for candidate in plain}


def _step_trials(
    stage: Stage,
    trials: dict[Candidate, Trial],
    coverage: float,
    finite: bool | None,
    deadline: float,
    report: Progress,
) -> bool:
    """Fill in whole steps while `next_trial` asks for one; True if the time ran out before."""
    reference = next(iter(trials))
    plain = _plain(trials)
    budget_s = STEP_S.get(stage.device.type, STEP_DEFAULT_S)
    done = 0
    while (candidate := next_trial(trials.values(), coverage=coverage, plain=plain)) is not None:
        if time.perf_counter() + expected_seconds(trials.values(), candidate) > deadline:
            return True
        report(f"timing a step in {candidate.key}", min(0.4 + 0.2 * done, 0.95))
        trials[candidate] = stage.try_step(trials[candidate], reference=reference, finite=finite, budget_s=budget_s)
        done += 1
    return False


def _plain(trials: Iterable[Candidate]) -> Candidate:
    """FP32 in the memory format the model has, which candidates begin with."""
    return replace(next(iter(trials)), format="fp32")


def _first_trial(candidate: Candidate, recording: Recording, layers: LayerTimes) -> Trial:
    """What recording and layers say of a candidate."""
    if candidate.format in recording.failed:
        failure, detail = recording.failed[candidate.format]
        return Trial(candidate=candidate, failure=failure, detail=detail)
    if candidate in layers.errors:
        return Trial(candidate=candidate, failure=Failure.ERROR, detail=layers.errors[candidate])
    return Trial(candidate=candidate, layers_ms=layers.total_ms(candidate))


def _evidence(verdict: Verdict, trials: Iterable[Trial], layers: LayerTimes) -> dict[str, Any]:
    """Milliseconds of every step and of every sum of layers, failures, and how much was timed."""
    evidence: dict[str, Any] = {"chosen": verdict.candidate.key, "coverage": round(layers.coverage, 4)}
    failed = {}
    for trial in trials:
        name = trial.candidate.key
        if trial.step_ms is not None:
            evidence[f"{name}_ms"] = round(trial.step_ms, 4)
        if trial.layers_ms is not None:
            evidence[f"{name}_layers_ms"] = round(trial.layers_ms, 4)
        if trial.failure is not None:
            failed[name] = f"{trial.failure} {trial.detail}".rstrip()
    if failed:
        evidence["failed"] = failed
    if layers.untimed:
        evidence["untimed"] = dict(layers.untimed)
    return evidence


def _as_plan(plan: PrecisionPlan, verdict: Verdict, evidence: Mapping[str, Any], layers: LayerTimes) -> PrecisionPlan:
    """The plan with the decision for the whole model and one for every layer that was timed."""
    new = plan.base.name
    whole = Decision(layer="", old="fp32", new=new, reason=verdict.reason, detail=verdict.detail, evidence=evidence)
    timed = [_layer_decision(name, ms, verdict) for name, ms in layers.of_layers().items() if name]
    return replace(plan, decisions=(whole, *timed))


def _layer_decision(name: str, ms: Mapping[str, float], verdict: Verdict) -> Decision:
    """The layer follows the whole; where it alone would be faster in another format, the detail says so.

    Under a scaled recipe a layer that is slower in it keeps the region's format, and says that.
    """
    if name in verdict.candidate.kept:
        return Decision(
            layer=name,
            old="fp32",
            new=RECIPES[verdict.candidate.format].region,
            reason=Reason.MEASURED_SLOWER,
            detail=f"{verdict.candidate.key} is not faster here by {100 * (PAYS - 1):.0f} %",
            evidence={f"{key}_ms": round(value, 4) for key, value in ms.items()},
        )
    own = ms.get(verdict.candidate.key)
    best = min(ms, key=ms.__getitem__)
    alone = own is not None and ms[best] < own
    return Decision(
        layer=name,
        old="fp32",
        new=verdict.candidate.format,
        reason=verdict.reason,
        detail=f"follows the whole model; alone it is fastest in {best}" if alone else "",
        evidence={f"{key}_ms": round(value, 4) for key, value in ms.items()},
    )


def _only_fp32(pins: Mapping[str, str | Recipe], capabilities: Capabilities) -> PrecisionPlan:
    """The plan of a device with nothing to try."""
    decision = Decision(
        layer="",
        old="fp32",
        new="fp32",
        reason=Reason.DEVICE_LACKS,
        detail=f"{capabilities.device_name} multiplies in no lower format that training can use",
        evidence={"chosen": "fp32"},
    )
    return replace(PrecisionPlan.of("fp32", pins), decisions=(decision,))


def _cached(cache: CostCache, key: Mapping[str, Any]) -> PrecisionPlan | None:
    """The plan measured before under the same key; its evidence says where it comes from."""
    data = cache.get(key)
    if data is None:
        return None
    try:
        plan = PrecisionPlan.from_json(data)
        whole, *layers = plan.decisions
    except (PlanError, ValueError):
        cache.discard(key)
        return None
    return replace(plan, decisions=(replace(whole, evidence={**whole.evidence, "from_cache": True}), *layers))
