"""Parameters of one device that one kernel steps together, by tables of where they lie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_mp.ops.pointer_table import Lines, PointerTable
from deepseek_mp.optim.fused import FusedBatch, Numbers
from deepseek_mp.optim.states import CODES, SCALES
from deepseek_mp.optim.stored import COMPENSATION, STREAM, StoredOptimizer

_GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = 1 << 31


class Kind(NamedTuple):
    """What parameters of one launch have in common, besides the number of their step."""

    storage: str
    gradient: torch.dtype
    permuted: bool
    even: bool
    """Whether their values are multiples of 16, so that threads may read several at once."""


@dataclass(frozen=True, kw_only=True)
class ManyRule:
    """How an optimizer's rule is run by one kernel for many parameters of a group."""

    run: Callable[[Any], None]
    """Takes what `make` makes."""
    make: Callable[..., Any]
    """`ops.fused_steps.ManyAdamW`, say."""
    moments: Sequence[str]
    options: Mapping[str, Any]
    """What `make` is given besides the numbers, and what `ops.fused_steps.Many` has."""
    batch_of: Callable[[Sequence[Tensor]], FusedBatch]
    numbers_of: Callable[[FusedBatch], Numbers]
    """Counts the step."""


def step_many(optimizer: StoredOptimizer, params: Sequence[Tensor], rule: ManyRule) -> list[Tensor]:
    """Step parameters of one device, each of which has a gradient; gives those that cannot be stepped so.

    While a graph is captured none can: it would have to hold on to the tables, and a launch costs nothing in it.
    """
    if _is_capturing(params[0].device):
        return list(params)
    kinds = [kind_of(optimizer, parameter) for parameter in params]
    fit = [parameter for parameter, kind in zip(params, kinds, strict=True) if kind is not None]
    if not fit:
        return list(params)
    about = rule.batch_of(fit)
    numbers = rule.numbers_of(about)
    known = not isinstance(numbers["step"], Tensor)
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, kind in enumerate(kind for kind in kinds if kind is not None):
        alike[kind, numbers["step"][index] if known else None].append(index)
    turns: dict[Kind, int] = defaultdict(int)
    for (kind, _), places in alike.items():
        table = _table(optimizer, (id(about.group), fit[0].device, kind, turns[kind]), fit[0].device)
        turns[kind] += 1
        _refresh(table, about, places, rule.moments)
        values = {name: value[places[0]] for name, value in numbers.items()} if known else numbers
        now = rule.make(
            table=table, storage=kind.storage, gradient=kind.gradient, permuted=kind.permuted,
            seed=about.seed, scale=about.scale, skip=about.skip, **values, **rule.options,
        )  # fmt: skip
        rule.run(now)
    return [parameter for parameter, kind in zip(params, kinds, strict=True) if kind is None]


def kind_of(optimizer: StoredOptimizer, parameter: Tensor) -> Kind | None:
    """Of a parameter with a gradient; None if it cannot be stepped together with others."""
    grad = parameter.grad
    assert grad is not None, "only parameters with a gradient are stepped"
    permuted = _permuted(parameter, grad, optimizer.state[parameter].get(COMPENSATION))
    if permuted is None or grad.dtype not in _GRADIENTS:
        return None
    return Kind(optimizer.storage(parameter).value, grad.dtype, permuted, parameter.numel() % 16 == 0)


def _permuted(parameter: Tensor, grad: Tensor, compensation: Tensor | None) -> bool | None:
    """Whether all three lie in channels_last; None if they lie neither so nor in the order of `flatten()`."""
    tensors = (parameter, grad) if compensation is None else (parameter, grad, compensation)
    if all(tensor.is_contiguous() for tensor in tensors):
        return False
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(parameter.dim())
    if form is None or parameter.numel() >= _LARGEST:  # kernels divide whole numbers of 32 bits
        return None
    return True if all(tensor.is_contiguous(memory_format=form) for tensor in tensors) else None


def _table(optimizer: StoredOptimizer, key: object, device: torch.device) -> PointerTable:
    table = optimizer.tables.get(key)
    if table is None:
        table = optimizer.tables[key] = PointerTable(device)
    return table


def _refresh(table: PointerTable, about: FusedBatch, places: list[int], moments: Sequence[str]) -> None:
    """Make the table say where the parameters at some places of the batch lie."""
    params = [about.batch.params[place] for place in places]
    states = [about.batch.states[place] for place in places]
    keys = [name + part for name in moments for part in (CODES, SCALES)]
    rests = [state.get(COMPENSATION) for state in states]
    lines = Lines(
        weights=[parameter.data_ptr() for parameter in params],
        compensations=[0 if rest is None else rest.data_ptr() for rest in rests],
        counts=[parameter.numel() for parameter in params],
        streams=[state.get(STREAM, 0) for state in states],
        channels=[parameter.shape[1] for parameter in params],
        pixels=[parameter.shape[2:].numel() for parameter in params],
        numbers=places,
        moments=[[state[key].data_ptr() for state in states] for key in keys],
    )
    table.refresh(lines, [parameter.grad.data_ptr() for parameter in params if parameter.grad is not None])


def _is_capturing(device: torch.device) -> bool:
    """Whether what is launched now is recorded into a graph."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    asked = getattr(module, "is_current_stream_capturing", None)
    return asked is not None and bool(asked())
