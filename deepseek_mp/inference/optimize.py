"""`optimize_for_inference`: tries the forms that a model and a device have, and takes the fastest within a budget."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deepseek_mp.backends import capabilities, peak_memory_bytes, reset_peak_memory, synchronize
from deepseek_mp.costs.memory import distinct_bytes, peak_during
from deepseek_mp.costs.restore import random_states, set_random_states
from deepseek_mp.costs.timing import is_out_of_memory
from deepseek_mp.errors import ConfigError, explain, first_line
from deepseek_mp.inference.arguments import arguments_of, clones, undoing
from deepseek_mp.inference.card import Card, ServingPlan
from deepseek_mp.inference.choice import Trial, choose
from deepseek_mp.inference.fidelity import Metric, check_metric, error_of, find_metric, is_finite, name_of
from deepseek_mp.inference.form import FORMATS, Form, candidates, narrow
from deepseek_mp.inference.measure import energy, latencies
from deepseek_mp.inference.mixed import MixedForms
from deepseek_mp.inference.quantised_linear import linear_kinds
from deepseek_mp.inference.recorder import records
from deepseek_mp.inference.serve import NARROW, Served, has_images, has_norms
from deepseek_mp.nn.nested import check_nesting, first_tensor, tensors

Progress = Callable[[str, float], None]
BUILDING, TIMING = 0.7, 0.85
"""Shares of the work that are done after them, as `progress` is told: most of the time is the compiler's."""
WARM = 3
"""Calls before anything is measured: compilers and libraries choose in the first ones."""


class Optimised(NamedTuple):
    """`model, plan, card = optimize_for_inference(...)`."""

    model: Served
    plan: ServingPlan
    card: Card


def optimize_for_inference(
    model: nn.Module,
    example_inputs: Any,
    *,
    budget: float = 1e-3,
    metric: str | Metric = "kl",
    compile: bool = True,
    graphs: bool = True,
    seconds: float = 1.0,
    energy_seconds: float = 0.0,
    layer_seconds: float = 20.0,
    formats: tuple[str, ...] | None = None,
    progress: Progress | None = None,
) -> Optimised:
    """A copy of the model in the fastest form whose outputs stay within the budget, on the model's own device.

    Each form (format, kind of linear layers, memory layout, folded BatchNorm, eager or compiled, launched or replayed)
    is built from a copy, checked against the FP32 outputs and timed in turn with the others. FP32, TF32 and BF16, eager
    and compiled, are always among them; where there are kinds of linear layers, they are also chosen by layer, and what
    cannot win, as plain code and layers alone have shown, is neither compiled nor recorded. The model itself, its mode
    and the state of PyTorch's generators are as before, also after an exception.

    Args:
        model: in evaluation or training mode; it is run as in evaluation.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments, on the model's device, of the
            sizes that will be served.
        budget: the largest metric allowed.
        metric: 'kl' (nats, of logits), 'relative' (norm of the difference), or a function of outputs and reference, 0
            for equal ones and larger for worse.
        compile: try `torch.compile` too, which takes some ten seconds for each format.
        graphs: try recorded calls too (CUDA graphs), on devices that have them. Inputs are then copied in, and outputs
            out; what varies from call to call must be in tensors or arguments, and state in buffers.
        seconds: of timing for each form.
        energy_seconds: window of the energy counter for each form; 0 leaves energy out, 30 can be trusted.
        layer_seconds: for choosing kinds by layer (`inference.by_layer`); 0 leaves it out, and tries all forms.
        formats: only these, of 'fp32', 'tf32', 'hf32', 'bf16', 'fp16'; FP32 is always among them. Other kinds of
            linear layers are tried beside BF16, or beside FP16 where there is no BF16.
        progress: called with what is being done and the share of it that is done; `print` will do.

    Returns:
        `model`, called as the original is, without gradients, whose floating outputs are FP32; `plan`, why each form
        was taken or not; and `card`, the numbers of all forms. Both can be printed and have `to_json()`.

    Raises:
        ConfigError: an argument that is not allowed, a metric that gives no number or is not 0 for equal outputs, a
            model that cannot be copied, or outputs that are not finite.
    """
    check_nesting(example_inputs, "example inputs")
    _check(model, budget, progress, seconds=seconds, energy_seconds=energy_seconds, layer_seconds=layer_seconds)
    judge = find_metric(metric)
    tensor = first_tensor(example_inputs)
    device = _device_of(model, tensor)
    batch = 1 if tensor is None or tensor.dim() == 0 else tensor.shape[0]
    forms = _forms(model, device, formats, compile, graphs)
    mixed = MixedForms(model, forms, lambda served: _outputs(served, example_inputs), judge, budget, layer_seconds)
    randomness = random_states(device)
    try:
        trials, served = _tried(
            model, example_inputs, device, judge, mixed, budget=budget, seconds=seconds, energy_seconds=energy_seconds,
            report=progress or (lambda text, share: None),
        )  # fmt: skip
        form, explained = choose(trials, budget)
    finally:
        set_random_states(randomness, device)
    plan = ServingPlan(form=form, budget=budget, metric=name_of(metric), trials=tuple(explained), layers=mixed.plan)
    card = Card(model=type(model).__name__, device=_name_of(device), batch_size=batch, plan=plan)
    served[form].card, served[form].example_inputs = card, example_inputs
    return Optimised(served[form], plan, card)


def _forms(
    model: nn.Module, device: torch.device, formats: tuple[str, ...] | None, compile: bool, graphs: bool
) -> list[Form]:
    has = capabilities(device).matmul_formats
    if formats is not None:
        known = [name for name in FORMATS if name in has]
        if isinstance(formats, str):
            raise ConfigError(explain(f"formats={formats!r}", "a tuple of names", f"Pass ({formats!r},)"))
        if not isinstance(formats, Collection) or not all(isinstance(name, str) for name in formats):
            passed, allowed = f"formats={formats!r}", f"a tuple of names: {', '.join(known)}"
            raise ConfigError(explain(passed, allowed, "Name them by text"))
        if unknown := sorted(set(formats) - set(known)):
            passed = f"formats with {', '.join(unknown)} on {device}"
            raise ConfigError(explain(passed, ", ".join(known), "Leave it out"))
        has = has & {"fp32", *formats}
    beside = narrow(has)
    linear = [] if beside is None else linear_kinds(model, NARROW[beside], device)
    images, norms = has_images(model), has_norms(model)
    graphed = graphs and records(device)
    return candidates(has | {"fp32"}, images=images, norms=norms, compiled=compile, graphed=graphed, linear=linear)


def _tried(
    model: nn.Module,
    inputs: Any,
    device: torch.device,
    metric: Metric,
    mixed: MixedForms,
    *,
    budget: float,
    seconds: float,
    energy_seconds: float,
    report: Progress,
) -> tuple[list[Trial], dict[Form, Served]]:
    """What was found of each form, and those that run."""
    reference: Any = None
    trials: list[Trial] = []
    served: dict[Form, Served] = {}
    errors: dict[Form, float] = {}
    for number, form in enumerate(_in_turn(mixed, served, report)):
        report(f"building {form.name}", round(BUILDING * min(1.0, number / len(mixed.others)), 3))
        if needless := mixed.needless(form, served, errors):
            trials.append(Trial(form=form, problem=needless))
            continue
        trial, one, outputs = _built(model, form, inputs, device, _alike(form, served))
        if reference is None:  # FP32 as it is comes first
            reference = _reference(trial, outputs, metric, budget)
        if one is not None and not trial.problem:
            error = error_of(metric, outputs, reference)
            trial = replace(trial, error=error, problem="" if math.isfinite(error) else "its outputs are not finite")
            errors[form] = error
        trials.append(trial)
        if one is not None and not trial.problem:
            served[form] = one
        gc.collect()
    runs = {form.name: _caller(one, inputs) for form, one in served.items()}
    with ExitStack() as states:
        states.callback(undoing(inputs))
        for one in {id(one.model): one for one in served.values()}.values():
            states.enter_context(one.kept_state())
        report(f"timing {len(runs)} forms", BUILDING)
        with _again_and_again():
            times = latencies(runs, device, seconds=seconds)
        shown = {form for form in served if energy_seconds > 0}
        if shown:
            report(f"measuring the energy of {len(shown)} forms", TIMING)
        with _again_and_again():
            joules = {form: energy(runs[form.name], device, seconds=energy_seconds) for form in shown}
    report("done", 1.0)
    return [
        replace(trial, latency=times.get(trial.form.name), energy=joules.get(trial.form)) for trial in trials
    ], served


@contextmanager
def _again_and_again() -> Iterator[None]:
    """Says of what is raised while calls are timed that it is not the first call that fails: all forms ran before."""
    try:
        yield
    except Exception as error:  # whatever the model's code makes it raise
        if isinstance(error, ConfigError) or is_out_of_memory(error):
            raise
        why = first_line(error)
        passed = f"a model that fails when it is called again and again ({why})"
        change = "Keep positions in its arguments instead of counting calls, so that no cache fills up"
        raise ConfigError(explain(passed, "one that takes any number of calls", change)) from error


def _reference(trial: Trial, outputs: Any, metric: Metric, budget: float) -> Any:
    """What all forms are measured against: the outputs in FP32, if there are some that can be."""
    if trial.problem:
        passed = f"a model that does not run in FP32 ({trial.problem.rstrip('.')})"
        allowed = "one that can be copied, and example inputs that it runs on"
        raise ConfigError(explain(passed, allowed, "Change what is named there"))
    if not is_finite(outputs):
        passed = "a model whose FP32 outputs are not finite"
        raise ConfigError(explain(passed, "example inputs that it runs on", "Pass other inputs"))
    check_metric(metric, outputs, budget)
    if not any(tensor.numel() for tensor in tensors(outputs)):
        passed, allowed = "example inputs for which the outputs have no values", "inputs of one sample or more"
        raise ConfigError(explain(passed, allowed, "Pass some, as they will be served"))
    return outputs


def _alike(form: Form, served: Mapping[Form, Served]) -> Served | None:
    """One that keeps its weights as the form does, best with the same code; None: the form needs a copy of its own."""
    kept = [one for one in served.values() if _weights_of(one.form) == _weights_of(form)]
    return max(kept, key=lambda one: (one.form.format, one.form.compiled) == (form.format, form.compiled), default=None)


def _weights_of(form: Form) -> Form:
    """The form as far as it is one of the weights: how they are multiplied and launched is no part of that."""
    kept = form.format if form.format in NARROW else "fp32"
    return replace(form, format=kept, compiled=False, graphed=False)


def _in_turn(mixed: MixedForms, served: Mapping[Form, Served], report: Progress) -> Iterator[Form]:
    """The forms that there are anyway, and when these are built those with kinds by layer."""
    yield from mixed.others
    report("choosing kinds by layer", BUILDING)
    yield from mixed.forms(served)


def _built(
    model: nn.Module, form: Form, inputs: Any, device: torch.device, like: Served | None = None
) -> tuple[Trial, Served | None, Any]:
    """The form, warm, with its outputs; a trial that says why, where it does not run."""
    trial = Trial(form=form)
    try:
        served = Served(model, form, device, like)
        call, undo = _caller(served, inputs), undoing(inputs)
        weights = [*served.parameters(), *served.buffers()]
        resident = [tensor for tensor in weights if tensor.device == device]
        with served.kept_state():
            for _ in range(WARM):
                outputs = call()
                undo()
            outputs = clones(outputs)
            synchronize(device)
            before = _held(device)
            peak = peak_during(call, device, resident=resident)
            undo()
    except ConfigError as error:
        return replace(trial, problem=str(error)), None, None
    except Exception as error:  # noqa: BLE001 - a form that the model does not bear is an answer, whatever it raises
        kind = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        return replace(trial, problem=kind.splitlines()[0][:200]), None, None
    if peak is not None:
        peak += served.graph_bytes - before + (distinct_bytes(resident) if device.type != "cpu" else 0)
    return replace(trial, weight_bytes=distinct_bytes(weights), peak_bytes=peak), served, outputs


def _held(device: torch.device) -> int:
    """Bytes in tensors now, where the device counts them: all weights, the inputs and what is kept of earlier calls."""
    if device.type == "cpu":
        return 0  # there a peak is of what is named
    reset_peak_memory(device)
    return peak_memory_bytes(device) or 0


def _caller(served: Served, inputs: Any) -> Callable[[], Any]:
    args, kwargs = arguments_of(inputs)
    return lambda: served(*args, **kwargs)


def _outputs(served: Served, inputs: Any) -> Any:
    """Of one call, which changes nothing of the inputs."""
    undo = undoing(inputs)
    outputs = clones(_caller(served, inputs)())
    undo()
    return outputs


def _check(model: object, budget: float, progress: object, **times: float) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(explain(f"a model of type {type(model).__name__}", "an nn.Module", "Pass one"))
    if progress is not None and not callable(progress):
        passed, allowed = f"progress={progress!r}", "None, or a function of what is done and its share"
        raise ConfigError(explain(passed, allowed, "Pass print, or a function of your own"))
    if not (isinstance(budget, Real) and budget >= 0):
        raise ConfigError(explain(f"budget={budget!r}", "a number from 0", "Pass the largest metric that you allow"))
    for name, value in times.items():
        if not (isinstance(value, Real) and 0 <= value < math.inf):
            raise ConfigError(explain(f"{name}={value!r}", "a number from 0", "Pass a time in seconds"))


def _device_of(model: nn.Module, tensor: Tensor | None) -> torch.device:
    """That of the weights, or of the inputs; `ConfigError` if they are apart, have no values, or are missing."""
    places = {weight.device for weight in (*model.parameters(), *model.buffers())}
    places |= set() if tensor is None else {tensor.device}
    if len(places) != 1:
        passed = f"a model and inputs on {', '.join(sorted(map(str, places))) or 'no device'}"
        raise ConfigError(explain(passed, "all on one device", "Move the model and the example inputs to one"))
    device = places.pop()
    if device.type == "meta":
        passed, allowed = "a model and inputs on the meta device", "tensors with values"
        raise ConfigError(explain(passed, allowed, "Call model.to_empty and initialise it, and make inputs"))
    return device


def _name_of(device: torch.device) -> str:
    return capabilities(device).device_name or str(device)
