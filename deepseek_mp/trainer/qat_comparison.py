"""INT8 beside FP32 and BF16: what a model trained for INT8 is served in, where INT8 must be worth it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import nn

from deepseek_mp.backends import capabilities
from deepseek_mp.costs.memory import distinct_bytes
from deepseek_mp.errors import BatchError, ConfigError, explain, first_line
from deepseek_mp.inference import Card, Form, ServingPlan, Trial, latencies
from deepseek_mp.inference.fidelity import Metric, check_metric, error_of, find_metric, is_finite, name_of
from deepseek_mp.nn.nested import first_tensor
from deepseek_mp.qat import FloatingModel, SimulatedModel, convert

GAIN = 1.1
"""How many times as fast as the best floating form INT8 must be: its rounding should buy something."""
WARM = 3
"""Calls before anything is measured, the first of which compiles."""
CPU = torch.device("cpu")
BUILDERS: Mapping[Form, Callable[[SimulatedModel], nn.Module]] = {
    Form(format="fp32", compiled=True): lambda simulated: FloatingModel(simulated, torch.float32),
    Form(format="bf16", compiled=True): lambda simulated: FloatingModel(simulated, torch.bfloat16),
    Form(format="int8", compiled=True): convert,
}
"""All with BatchNorms folded, weights as constants, and the same way to be called."""


class Compared(NamedTuple):
    """`model, plan, card = trainer.compare(inputs)`."""

    model: nn.Module
    """An `Int8Model` or a `FloatingModel`, compiled for the inputs' sizes."""
    plan: ServingPlan
    card: Card


def compare(
    simulated: SimulatedModel, inputs: Any, *, budget: float, metric: str | Metric, gain: float, seconds: float
) -> Compared:
    """Build the three forms, time them in turn on the inputs, and take INT8 only if it is `gain` times as fast.

    Raises:
        ConfigError: an argument that is not allowed, a metric that gives no number or is not 0 for equal outputs, or
            PyTorch has no oneDNN.
        BatchError: inputs that the model does not take, or for which the FP32 outputs are not finite.
    """
    _check(budget, gain, seconds)
    judge = find_metric(metric)
    built, trials = _tried(simulated, inputs, judge, budget)
    times = latencies({form.name: _caller(model, inputs) for form, model in built.items()}, CPU, seconds=seconds)
    trials = [replace(trial, latency=times.get(trial.form.name)) for trial in trials]
    taken, explained = chosen(trials, budget, gain)
    plan = ServingPlan(form=taken, budget=budget, metric=name_of(metric), trials=tuple(explained))
    first = first_tensor(inputs)
    size = 1 if first is None or first.dim() == 0 else first.shape[0]
    device = capabilities(CPU).device_name or "cpu"
    return Compared(built[taken], plan, Card(model=simulated.name, device=device, batch_size=size, plan=plan))


def _tried(
    simulated: SimulatedModel, inputs: Any, metric: Metric, budget: float
) -> tuple[dict[Form, nn.Module], list[Trial]]:
    """The forms that run, warm, and a trial of each."""
    built, trials, reference = {}, [], None
    for form, build in BUILDERS.items():
        try:
            model = build(simulated)
            call = _caller(model, inputs)
            outputs = [call() for _ in range(WARM)][-1]
        except Exception as error:  # what is not borne, or not compiled, is an answer, whatever it raises
            if isinstance(error, ConfigError | BatchError):
                raise
            problem = first_line(error)
            if form.format == "fp32":
                passed = f"inputs with which the model fails in FP32 ({problem})"
                allowed = "inputs like example_inputs, in sizes that the model takes"
                raise BatchError(explain(passed, allowed, "Pass the inputs alone, without targets")) from error
            trials.append(Trial(form=form, problem=problem))
            continue
        if reference is None:
            reference = outputs
            if not is_finite(reference):
                passed = "inputs whose FP32 outputs are not finite"
                raise BatchError(explain(passed, "finite outputs", "Pass other inputs"))
            check_metric(metric, reference, budget)
        graph: Any = model.graph
        held = distinct_bytes([*graph.parameters(), *graph.buffers()])
        trials.append(Trial(form=form, error=error_of(metric, outputs, reference), weight_bytes=held))
        built[form] = model
    return built, trials


def chosen(trials: Sequence[Trial], budget: float, gain: float) -> tuple[Form, list[Trial]]:
    """The form that is taken, and the trials with the reason of each.

    Args:
        trials: FP32 first, which is always allowed; timed where they have no problem.
        budget: the largest error allowed.
        gain: that INT8 must have over the fastest of the others.
    """
    allowed = [trial for trial in trials if trial is trials[0] or (trial.is_usable and _within(trial, budget))]
    best = min((trial for trial in allowed if trial.form.format != "int8"), key=_ms)
    int8 = next((trial for trial in allowed if trial.form.format == "int8"), None)
    taken = int8 if int8 is not None and _ms(int8) * gain <= _ms(best) else best
    return taken.form, list(_explained(trials, taken, best, budget, gain))


def _explained(trials: Sequence[Trial], taken: Trial, best: Trial, budget: float, gain: float) -> Iterator[Trial]:
    for trial in trials:
        if trial.problem:
            yield replace(trial, why=trial.problem)
            continue
        rate = f"{_ms(best) / _ms(trial):.3g} times as fast as {best.form.name}"
        if trial is not trials[0] and not _within(trial, budget):
            yield replace(trial, why=f"error {trial.error:.3g} is beyond the budget of {budget:g}")
        elif trial is taken:
            faster = rate if trial is not best else "the fastest of the floating forms"
            yield replace(trial, why=f"taken: {faster}, error {trial.error:.3g} within {budget:g}")
        elif trial.form.format == "int8":
            yield replace(trial, why=f"{rate}, less than the {gain:g} times that INT8 must be")
        else:
            yield replace(trial, why=f"{_ms(trial) / _ms(taken):.3g} times the time of {taken.form.name}")


def _within(trial: Trial, budget: float) -> bool:
    return trial.error is not None and trial.error <= budget  # False for NaN


def _ms(trial: Trial) -> float:
    assert trial.latency is not None, "asked only of what was timed"
    return trial.latency.median_ms


def _caller(model: nn.Module, inputs: Any) -> Callable[[], Any]:
    if isinstance(inputs, Mapping):
        return lambda: model(**inputs)
    args = inputs if isinstance(inputs, tuple) else (inputs,)
    return lambda: model(*args)


def _check(budget: float, gain: float, seconds: float) -> None:
    if not (isinstance(budget, Real) and budget >= 0):
        raise ConfigError(explain(f"budget={budget!r}", "a number from 0", "Pass the largest metric that you allow"))
    if not (isinstance(gain, Real) and 1 <= gain < math.inf):
        raise ConfigError(explain(f"gain={gain!r}", "a number from 1", "Pass how many times as fast INT8 must be"))
    if not (isinstance(seconds, Real) and 0 <= seconds < math.inf):
        raise ConfigError(explain(f"seconds={seconds!r}", "a number from 0", "Pass a time in seconds"))
