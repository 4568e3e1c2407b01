"""A trainer's state as tensors and JSON values, and back: keyed by parameter name, never by order.

PyTorch's optimizers number their parameters, so a changed order swaps the moments of two layers
without a word, and loading casts a state to its parameter's format. Here every entry carries the
name of its parameter, and is loaded in the format it was saved in or not at all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepseek_mp.errors import CheckpointError, explain
from deepseek_mp.optim.offload import OffloadedOptimizer
from deepseek_mp.optim.offload.stepped import land, stepped
from deepseek_mp.optim.stored import NOT_HERE, StoredOptimizer
from deepseek_mp.trainer import offloaded

Tensors = dict[str, Tensor]
COUNTERS = ("step", "mu_product")
"""What PyTorch's optimizers keep on the host; the names tell them from the state of a 0-dim parameter."""
TENSOR = "$tensor"
"""The key of what stands for a tensor in a value whose tensors were split off."""


def model_tensors(model: nn.Module) -> Tensors:
    """Parameters and persistent buffers by name; tied ones under each of their names."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def transient_buffers(model: nn.Module) -> Tensors:
    """The buffers that `state_dict` leaves out; training may change them all the same."""
    kept = model.state_dict()
    return {name: b for name, b in model.named_buffers() if name not in kept}


def loss_buffers(loss: object) -> Tensors:
    """The buffers of a loss that is a module, such as a running mean: its forward changes them as the model's does."""
    return dict(loss.named_buffers()) if isinstance(loss, nn.Module) else {}


def outside_parameters(model: nn.Module, optimizer: Optimizer) -> Tensors:
    """What the optimizer trains beside the model (the parameters of a loss function, for one), by position.

    Of an offloaded one what its master stands for, as of the model.
    """
    inside, masters = {id(p) for p in model.parameters()}, offloaded.masters(optimizer)
    names = parameter_names(model, optimizer)
    trained = [(names[id(p)], masters.get(id(p), p)) for group in optimizer.param_groups for p in group["params"]]
    return {name: p for name, p in trained if id(p) not in inside}


def split_tensors(value: Any, tensors: Tensors) -> Any:
    """The value with every tensor in its dictionaries, lists and tuples moved to `tensors`."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {TENSOR: name}
    if type(value) is dict:
        return {key: split_tensors(item, tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(split_tensors(item, tensors) for item in value)
    return value


def join_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The reverse of `split_tensors`."""
    if type(value) is dict:
        if value.keys() == {TENSOR} and isinstance(value[TENSOR], str):
            return tensors[value[TENSOR]]
        return {key: join_tensors(item, tensors) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(join_tensors(item, tensors) for item in value)
    return value


def _mismatch(what: str, saved: object, here: object) -> CheckpointError:
    return CheckpointError(
        explain(
            f"checkpoint with {what} {saved}, but the one here has {here}",
            "a checkpoint of the same model and optimizer",
            "Build the run as it was when the checkpoint was written",
        )
    )


def check_tensors(here: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """`CheckpointError` unless names, shapes and dtypes are those of the tensors here."""
    if here.keys() != saved.keys():
        raise _mismatch("tensors", sorted(saved.keys() - here.keys())[:5], sorted(here.keys() - saved.keys())[:5])
    for name, tensor in here.items():
        got, want = saved[name], tensor
        if got.shape != want.shape or got.dtype != want.dtype:
            raise _mismatch(name, f"{tuple(got.shape)} {got.dtype}", f"{tuple(want.shape)} {want.dtype}")


@torch.no_grad()
def load_model(model: nn.Module, saved: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    """Copy checked tensors into the model's own, which keep identity, ties and memory format."""
    load_tensors(model_tensors(model), saved)
    load_buffers(transient_buffers(model), buffers)


@torch.no_grad()
def load_buffers(here: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy saved buffers into those here that fit: a checkpoint need not have them."""
    for name, buffer in here.items():
        if name in saved and saved[name].shape == buffer.shape:
            buffer.copy_(saved[name])


@torch.no_grad()
def load_tensors(here: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy checked tensors into those here."""
    for name, tensor in here.items():
        tensor.copy_(saved[name])


def parameter_names(model: nn.Module, optimizer: Optimizer) -> dict[int, str]:
    """id of each parameter of the optimizer -> its name; those outside the model by position.

    The master of an offloaded parameter has the name of the parameter.
    """
    names = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
    names |= {master: names[id(p)] for master, p in offloaded.masters(optimizer).items() if id(p) in names}
    for g, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            names.setdefault(id(param), f"optimizer.{g}.{i}")
    return names


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> tuple[Tensors, dict[str, Any]]:
    """The optimizer's state: tensors as 'parameter/key', and groups and plain values as JSON."""
    names = parameter_names(model, optimizer)
    tensors: Tensors = {}
    values: dict[str, Any] = {}
    for param, entry in offloaded.states(optimizer).items():
        if id(param) not in names:
            passed = f"optimizer state under {param!r}, which is no parameter it trains"
            raise CheckpointError(
                explain(passed, "state per parameter", "Keep it under a parameter, or save it yourself")
            )
        for key, value in entry.items():
            place = f"{names[id(param)]}/{key}"
            if isinstance(value, Tensor):
                tensors[place] = value
            else:
                values[place] = value
    groups = [
        {
            "params": [names[id(p)] for p in group["params"]],
            "options": {k: _option(v) for k, v in group.items() if k != "params"},
        }
        for group in optimizer.param_groups
    ]
    return tensors, {"type": offloaded.type_name(optimizer), "groups": groups, "values": values}


def _option(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


def check_optimizer(model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """`CheckpointError` unless type, parameter names per group and options fit.

    The shapes of a state are the optimizer's business: it may keep means of rows, or a matrix for each dimension.
    """
    if saved["type"] != offloaded.type_name(optimizer):
        raise _mismatch("optimizer", saved["type"], offloaded.type_name(optimizer))
    names = parameter_names(model, optimizer)
    here = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    there = [group["params"] for group in saved["groups"]]
    if [sorted(g) for g in here] != [sorted(g) for g in there]:
        raise _mismatch("optimizer groups", *_first_difference(there, here))
    if isinstance(optimizer, StoredOptimizer | OffloadedOptimizer):  # which would pass over them
        wanted = {name for group in saved["groups"] for name in NOT_HERE if group["options"].get(name)}
        if wanted:
            raise _mismatch("an optimizer of", " and ".join(sorted(wanted)), "none of it")


def _first_difference(there: list[list[str]], here: list[list[str]]) -> tuple[str, str]:
    """The first group that differs, as the names each side has in it."""
    none: list[str] = []
    pairs = [(sorted(a), sorted(b)) for a, b in zip_longest(there, here, fillvalue=none)]
    group = next(index for index, (a, b) in enumerate(pairs) if a != b)
    a, b = pairs[group]
    return f"{a[:5]} in group {group}", str(b[:5])


@torch.no_grad()
def load_optimizer(
    model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor], saved: Mapping[str, Any]
) -> None:
    """Put a checked state into the optimizer: exact values and dtypes, the parameter's memory format."""
    names = parameter_names(model, optimizer)
    by_param: dict[str, dict[str, Any]] = defaultdict(dict)
    for place, value in [*tensors.items(), *saved["values"].items()]:
        name, key = place.rsplit("/", 1)
        by_param[name][key] = value
    optimizer.state.clear()
    for group, stored in zip(optimizer.param_groups, saved["groups"], strict=True):
        for key, value in stored["options"].items():
            if key in getattr(optimizer, "own_options", ()):
                continue
            current = group.get(key)
            if isinstance(current, Tensor):
                current.fill_(value)
            else:
                group[key] = tuple(value) if isinstance(current, tuple) else value
        on_device = bool(group.get("fused") or group.get("capturable"))
        for param in group["params"]:
            entry = by_param.get(names[id(param)])
            if entry:
                optimizer.state[param] = {key: _placed(key, value, param, on_device) for key, value in entry.items()}
    offloaded.states_loaded(optimizer)


def _placed(key: str, value: Any, param: Tensor, on_device: bool) -> Any:
    """A saved value where the optimizer expects it; a step counter stays on the host unless a fused kernel reads it."""
    if not isinstance(value, Tensor):
        return value
    counter = value.ndim == 0 and (param.ndim > 0 or key in COUNTERS)
    if value.shape == param.shape and not counter:
        return torch.empty_like(param, dtype=value.dtype).copy_(value)
    return value.clone().to("cpu" if counter and not on_device else param.device)


def _parameters(model: nn.Module, optimizer: Optimizer) -> Tensors:
    return dict(model.named_parameters()) | outside_parameters(model, optimizer)


def gradients(model: nn.Module, optimizer: Optimizer) -> Tensors:
    """The gradients of an open window, by parameter name; of what is trained beside the model too."""
    land(optimizer)
    found = ((name, stepped(optimizer, p).grad) for name, p in _parameters(model, optimizer).items())
    return {name: gradient for name, gradient in found if gradient is not None}


def load_gradients(model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Put back the gradients of an open window."""
    for name, own in _parameters(model, optimizer).items():
        param = stepped(optimizer, own)
        kept = saved.get(name)  # a BF16 weight may have an FP32 gradient
        param.grad = None if kept is None else torch.empty_like(param, dtype=kept.dtype).copy_(kept)
