"""From a model to one with fake quantisation: a copy, exported as a graph and prepared by torchao."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Mapping
from copy import deepcopy
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from deepseek_mp.backends.exporting_flags import fp32_flags_left_alone
from deepseek_mp.errors import ConfigError, explain, first_line
from deepseek_mp.nn import revert
from deepseek_mp.nn.checks import check_model
from deepseek_mp.nn.nested import first_tensor, map_leaves, tensors
from deepseek_mp.precision import Decision, PrecisionPlan
from deepseek_mp.programs.exporter_error import reason
from deepseek_mp.programs.quiet import quiet
from deepseek_mp.qat.first_dimensions import free_inputs, free_sizes_of
from deepseek_mp.qat.keep import kept_names
from deepseek_mp.qat.layers import KINDS, are_plain, layer_decisions, with_varying_weights
from deepseek_mp.qat.letting_go import models_let_go
from deepseek_mp.qat.likeness import does_the_same, nothing_is_zero, observe_example
from deepseek_mp.qat.modes import on_its_own
from deepseek_mp.qat.named_padding import number_paddings
from deepseek_mp.qat.norms import (
    average_by_count,
    complete_norms,
    give_momentum,
    norm_settings,
    put_back_settings,
    without_statistics_hidden,
)
from deepseek_mp.qat.other_dimensions import with_free_dimensions
from deepseek_mp.qat.regions import inline_regions
from deepseek_mp.qat.simulated import SimulatedModel
from deepseek_mp.qat.size_conditions import asked_by
from deepseek_mp.qat.sums import double, spell_out


@on_its_own()
def prepare(
    model: nn.Module, example_inputs: Any, *, keep: Collection[str] | PrecisionPlan | Path | None = ()
) -> SimulatedModel:
    """A copy of the model whose linear layers and convolutions are rounded as INT8 will round them.

    Weights are rounded by channel, symmetric, to -128...127; activations by tensor to 0...255 with a zero point. A
    BatchNorm behind a convolution is folded into its weights before those are rounded.

    Args:
        model: FP32, on the CPU; it stays as it is.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments, of two samples or more. All
            first dimensions may change later, if the model lets them.
        keep: names of modules that stay in FP32 with all that is in them; see `kept_names` for plans.

    Raises:
        ConfigError: torchao is missing, an argument does not fit, the model cannot be exported or has nothing to
            quantise, or the example inputs or weights of layers are not finite.
    """
    require_torchao()
    kept = kept_names(model, keep)
    copy = copied(model)
    revert(copy)  # of a trained model: a layer's class is what it is known by
    args, kwargs = _arguments(copy, example_inputs)
    if not model.training:
        copy.train()
    by_count = give_momentum(copy)
    program = _exported(copy, args, kwargs)
    graph, dynamic = program.module(check_guards=False), free_sizes_of(program, kwargs)
    inline_regions(graph)
    alone = not are_plain(copy, graph.graph) or bool(with_varying_weights(graph.graph))
    prepared = _prepared(graph, kept, alone=alone)
    average_by_count(prepared, by_count)
    decisions = layer_decisions(model, prepared, kept)
    if not any(decision.new == "int8" for decision in decisions):
        raise _nothing(decisions)
    sizes = asked_by(program, inspect.signature(copy.forward), args, kwargs)
    simulated = SimulatedModel(prepared, decisions, (args, kwargs), dynamic, sizes, type(model).__name__)
    simulated.train(model.training)
    try:
        alike = observe_example(copy, simulated)
    except Exception:  # of operations, for dtypes that the exporter does not look at
        _check_call(copy, args, kwargs)
        raise
    if alike:
        same = partial(does_the_same, copy, simulated)
        with simulated.kept_ranges(), nothing_is_zero(copy):  # whose parameters the graph shares
            free = free_inputs(program, args, kwargs)
            sizes = sizes.without_idle((args, kwargs), free, same)
            simulated.sizes = with_free_dimensions(sizes, (args, kwargs), free, same)
    return simulated


def require_torchao() -> None:
    """Import torchao; `ConfigError` that says what to install, where it is missing."""
    if find_spec("torchao") is None:
        passed = "quantisation without the package torchao"
        raise ConfigError(explain(passed, "torchao 0.18 or newer", "Install it: pip install 'deepseek-mp[quant]'"))
    with quiet("torchao", "torch.utils._pytree"):  # about kernels for GPUs that it does not load, and itself
        import_module("torchao.quantization.pt2e.quantize_pt2e")


def all_finite(tree: Any) -> bool:
    """Whether every value of its floating-point tensors is a finite number."""
    floating = (tensor for tensor in tensors(tree) if tensor.is_floating_point())
    return all(bool(torch.isfinite(tensor).all()) for tensor in floating)


def copied(model: nn.Module) -> nn.Module:
    """A copy that shares nothing with the model; `ConfigError` where Python cannot make one, or its layers wait."""
    check_model(model)
    try:
        return deepcopy(model)
    except (RuntimeError, TypeError) as error:
        passed = f"a {type(model).__name__} that cannot be copied ({error})"
        raise ConfigError(explain(passed, "a model that copy.deepcopy copies", "Drop what hangs on it")) from error


def _arguments(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments, checked."""
    first = first_tensor(example_inputs)
    if first is None or first.dim() == 0 or first.shape[0] < 2:
        passed = "example_inputs without a tensor of two samples or more"
        change = "Pass a small batch: an exported graph of one sample takes one sample only"
        raise ConfigError(explain(passed, "tensors whose first dimension is the batch, from 2", change))
    places = {t.device.type for t in (*model.parameters(), *model.buffers(), *tensors(example_inputs))}
    if places - {"cpu"}:
        passed = f"a model or example_inputs on {', '.join(sorted(places - {'cpu'}))}"
        raise ConfigError(explain(passed, "both on the CPU, where INT8 is computed", "Move them there with .cpu()"))
    if not all_finite(example_inputs):
        passed = "example_inputs with NaN or infinite values"
        raise ConfigError(explain(passed, "finite values, as in training", "Pass a batch of real data"))
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and weight.dtype is not torch.float32:
            passed = f"a model with {name!r} in {weight.dtype}"
            raise ConfigError(explain(passed, "weights in FP32, which are rounded", "Call model.float() first"))
    layers = [(where, layer) for where, layer in model.named_modules() if isinstance(layer, KINDS)]
    for where, layer in layers:  # elsewhere infinite ones may be meant, such as those of a mask
        if not all_finite(list(layer.parameters())):
            passed = f"a model whose layer {where!r} has weights that are not finite"
            raise ConfigError(explain(passed, "finite weights", "Load other weights"))
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return (example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)), {}


def _dynamic(leaf: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if isinstance(leaf, Tensor) and leaf.dim() else None


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExportedProgram:
    """The model in training mode, on the model's own tensors."""
    try:
        signature = inspect.signature(model.forward)
        given = signature.bind(*args, **kwargs).arguments  # by parameter, in its order: one may be several, as `*args`
        _check_named(type(model).__name__, signature, given)
        dynamic = map_leaves(given, _dynamic)
        with fp32_flags_left_alone(), warnings.catch_warnings():
            # Of the exporter, about PyTorch's own LSTM and GRU.
            warnings.filterwarnings("ignore", r"The tensor attributes? self\..*_flat_weights")
            return torch.export.export(model, args, kwargs, dynamic_shapes=dynamic)
    except ConfigError:
        raise
    except Exception as error:  # the exporter raises whatever the model's code makes it raise
        _check_call(model, args, kwargs)
        passed = f"a {type(model).__name__} that torch.export cannot export ({reason(error)})"
        change = "Rewrite what it names, or quantise the part of the model that can be exported"
        raise ConfigError(explain(passed, "a forward without decisions by values", change)) from error


def _check_named(model: str, signature: inspect.Signature, given: Mapping[str, Any]) -> None:
    """`ConfigError` for inputs that have no parameter of their own: the exporter fails at sizes of theirs."""
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD and name in given:
            passed = f"a {model} whose forward takes {', '.join(map(repr, given[name]))} by **{name}"
            raise ConfigError(explain(passed, "inputs with parameters of their own", "Name them in the forward"))


def _check_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """`ConfigError` where the model itself does not take the example inputs, which is no fault of the exporter."""
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as error:  # the model's code may raise anything
        passed = f"example_inputs with which the {type(model).__name__} itself fails ({first_line(error)})"
        allowed = "what its forward takes: a tensor, a tuple of positional or a mapping of keyword arguments"
        change = "Pass inputs alone, without targets, such that model(...) works with them"
        raise ConfigError(explain(passed, allowed, change)) from error


def _prepared(graph: fx.GraphModule, keep: Collection[str], *, alone: bool) -> fx.GraphModule:
    """With fake quantisation; BatchNorms keep their own mode, momentum and `eps`, which torchao's patterns replace."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    from deepseek_mp.qat.scheme import Quantizer

    number_paddings(graph)
    double(graph)
    spell_out(graph)
    complete_norms(graph)
    own = norm_settings(graph.graph)
    hidden = without_statistics_hidden(graph.graph)
    # The flags and warnings: it exports the patterns that it looks for.
    with models_let_go(), fp32_flags_left_alone(), hidden, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchao about itself
        prepared: fx.GraphModule = prepare_qat_pt2e(graph, Quantizer(keep, alone=alone))
    put_back_settings(prepared, own)
    return prepared


def _nothing(decisions: tuple[Decision, ...]) -> ConfigError:
    reasons = (
        "; ".join(f"{decision.layer or 'the model'}: {decision.detail}" for decision in decisions[:5])
        or "it has no such layer"
    )
    passed = f"a model with nothing to quantise ({reasons})"
    return ConfigError(explain(passed, "at least one Linear, Conv1d or Conv2d", "Shorten keep, or train it in BF16"))
