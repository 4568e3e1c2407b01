"""From a batch to the model's call and from its output to the loss: one place for everything.

Three forms of batch are understood:

    x                      model(x); a model that returns its own loss, or a loss_fn without target
    (input, target)        model(input); input may be a tensor, a tuple or list of tensors that are
                           passed one by one, or a mapping that is passed as keyword arguments
    {name: value}          model(**batch); the target is batch.get("labels"), which the model gets too
                           if its forward takes it
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from deepseek_mp.errors import BatchError, explain
from deepseek_mp.nn.loss import (
    IGNORED_LABEL,
    LossFn,
    averages_elements,
    check_loss,
    class_weights,
    count_labels,
    infer_loss,
    is_integer,
    weigh_labels,
)
from deepseek_mp.nn.nested import first_tensor, map_leaves

__all__ = [
    "Call", "LossFn", "Result", "batch_size", "invoke", "item_count", "keywords", "loss_of", "move", "own_loss",
    "parse_batch", "result", "run",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Call:
    """How the model is called for one batch, and what its output is compared with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one call gave. `items` is what the loss averages over, `loss_name` where it came from.

    Compiled code gives no output: it would have to be stored, and its gradient of zeros added.
    """

    loss: Tensor
    output: Any
    items: int | Tensor
    loss_name: str


def parse_batch(batch: Any) -> Call:
    """The call a batch stands for; `BatchError` naming the three forms if it is none of them."""
    if isinstance(batch, Tensor | PackedSequence):
        return Call(args=(batch,), kwargs={}, target=None)
    if isinstance(batch, Mapping):
        return Call(args=(), kwargs=_named(batch, batch), target=batch.get("labels"))
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise _wrong_form(_describe(batch))
    inputs, target = batch
    if isinstance(inputs, Tensor | PackedSequence):
        return Call(args=(inputs,), kwargs={}, target=target)
    if isinstance(inputs, Mapping):
        return Call(args=(), kwargs=_named(inputs, batch), target=target)
    if isinstance(inputs, tuple | list) and first_tensor(inputs) is not None:
        return Call(args=tuple(inputs), kwargs={}, target=target)
    raise _wrong_form(f"a pair whose input is {_describe(inputs)}")


def move(batch: Any, device: torch.device | str) -> Any:
    """The batch, or the call it stands for, with its tensors on `device`; every container keeps its type.

    Copies to an accelerator do not wait (they overlap where the memory is pinned); copies to the CPU
    do, since their values may be read right away. `BatchError` for a container that holds itself.
    """
    target = torch.device(device)

    def moved(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.to(target, non_blocking=target.type != "cpu")
        return leaf.to(target) if hasattr(leaf, "to") else leaf

    try:
        if isinstance(batch, Call):
            parts = map_leaves((batch.args, batch.kwargs, batch.target), moved)
            return Call(args=parts[0], kwargs=parts[1], target=parts[2])
        return map_leaves(batch, moved)
    except RecursionError as error:  # not looked for in front of every step
        passed, allowed = "a batch with a container that holds itself", "containers that have an end"
        raise BatchError(explain(passed, allowed, "Leave it out of itself")) from error


def batch_size(call: Call) -> int:
    """Samples in the batch: the first dimension of the first tensor; 0 for an empty batch."""
    packed = next((x for x in (*call.args, *call.kwargs.values()) if isinstance(x, PackedSequence)), None)
    tensor = first_tensor((call.args, call.kwargs))
    if packed is not None and tensor is packed.data:
        return int(packed.batch_sizes[0])  # lies on the CPU always
    if tensor is None:
        raise _wrong_form("a batch without tensors")
    return tensor.shape[0] if tensor.dim() else 1


def item_count(call: Call, ignored: int = IGNORED_LABEL) -> int | Tensor:
    """How many items a mean loss averages over; labels equal to `ignored` do not count.

    For class labels those that are not ignored (-100); a model that shifts its labels averages over slightly
    fewer, which only a loss_fn that returns its own count can tell. For other targets the samples.
    A number if the target is on the CPU, else a 0-dim tensor, so that nothing waits for the device.
    """
    if isinstance(call.target, Tensor) and is_integer(call.target):
        return count_labels(call.target, ignored)
    return batch_size(call)


def run(model: Callable[..., Any], call: Call, loss_fn: LossFn | None) -> Result:
    """Call the model and compute its loss; `BatchError` if the loss cannot be trained on."""
    output = invoke(model, call)
    return result(call, loss_of(output, call.target, loss_fn), loss_fn, output=output)


def loss_of(output: Any, target: Any, loss_fn: LossFn | None) -> tuple[Any, str]:
    """What the loss is, a scalar or a pair of it and its items, and where it came from; not checked yet.

    Works on tensors and shapes only, so that it can be compiled together with a model.
    """
    if loss_fn is not None:
        return loss_fn(output, target), "loss_fn"
    own = own_loss(output)
    if own is not None:
        return own, "output.loss"
    name, inferred = infer_loss(output, target)
    return inferred(output, target), name


def own_loss(output: Any) -> Any:
    """The loss that a model returned itself, or None."""
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)


def invoke(model: Callable[..., Any], call: Call) -> Any:
    """The model's output."""
    return model(*call.args, **keywords(model, call))


def keywords(model: Callable[..., Any], call: Call) -> dict[str, Any]:
    """The model's keyword arguments. `labels` that are the target are among them if its forward takes them."""
    kwargs = call.kwargs
    if call.target is not None and kwargs.get("labels") is call.target:
        forward = model.forward if isinstance(model, nn.Module) else model
        if not _takes_labels(getattr(forward, "__func__", forward)):
            kwargs = {name: value for name, value in kwargs.items() if name != "labels"}
    return kwargs


@cache
def _takes_labels(forward: Callable[..., Any]) -> bool:
    parameters = inspect.signature(forward).parameters.values()
    return any(p.name == "labels" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def result(call: Call, found: tuple[Any, str], loss_fn: LossFn | None, *, output: Any = None) -> Result:
    """What `loss_of` found, checked, with its item count: the one that came with it, or the batch's."""
    value, name = found
    if not isinstance(value, tuple):
        return Result(loss=check_loss(value), output=output, items=_items_of(call, loss_fn), loss_name=name)
    if len(value) != 2 or not _is_count(value[1]):
        raise BatchError(
            explain(
                f"loss_fn returned a tuple of {_describe(value)}",
                "a scalar tensor, or the pair (scalar tensor, number of items it averages over)",
                "Return the loss alone, or with a whole number or 0-dim tensor as its count",
            )
        )
    return Result(loss=check_loss(value[0]), output=output, items=value[1], loss_name=name)


def _items_of(call: Call, loss_fn: LossFn | None) -> int | Tensor:
    """What a loss that does not count averages over; PyTorch's loss modules say what they leave out and weigh."""
    ignored, weight = getattr(loss_fn, "ignore_index", IGNORED_LABEL), class_weights(loss_fn)
    if weight is not None and isinstance(call.target, Tensor) and is_integer(call.target):
        return weigh_labels(call.target, weight, ignored)
    if isinstance(call.target, Tensor) and averages_elements(loss_fn):
        return call.target.numel()
    return item_count(call, ignored)


def _is_count(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.dim() == 0 and value.dtype != torch.bool
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _named(inputs: Mapping[Any, Any], batch: Any) -> dict[str, Any]:
    if not inputs or not all(isinstance(key, str) for key in inputs):
        raise _wrong_form(_describe(batch))
    return dict(inputs)


def _describe(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)} ({', '.join(type(item).__name__ for item in value[:4])})"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with keys {list(value)[:4]}"
    return type(value).__name__


def _wrong_form(passed: str) -> BatchError:
    return BatchError(
        explain(
            f"a batch that is {passed}",
            "a tensor; a pair (input, target) whose input is a tensor, a tuple or list of tensors, or a mapping; "
            "or a mapping from the model's argument names",
            "Change what the loader's collate_fn returns",
        )
    )
