"""Parameters of one device that one kernel steps together, by tables of where they lie."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_mp.ops.capturing import is_capturing
from deepseek_mp.ops.pointer_table import Lines, PointerTable
from deepseek_mp.optim.fused import FusedBatch, KernelRule
from deepseek_mp.optim.many_check import is_right
from deepseek_mp.optim.states import CODES, SCALES, StateFormat
from deepseek_mp.optim.stored import COMPENSATION, STREAM, StoredOptimizer

_PARAMETERS = (torch.float32, torch.bfloat16)
_GRADIENTS = (torch.float32, torch.bfloat16, torch.float16)
_LARGEST = 1 << 31


class Kind(NamedTuple):
    """What parameters of one launch have in common, besides the number of their step."""

    storage: str
    gradient: torch.dtype
    in_blocks: bool
    permuted: bool
    even: bool
    """Whether their values are multiples of 16, so that threads may read several at once."""


def step_many(
    optimizer: StoredOptimizer,
    group: Mapping[str, Any],
    lists: tuple[list[Tensor], list[Tensor]],
    rule: KernelRule,
    batch_of: Callable[[Sequence[Tensor]], FusedBatch],
) -> tuple[list[Tensor], list[Tensor]]:
    """Step what can be stepped together of two lists; gives the rest of both.

    Moments that are whole are stepped so where the group has others in blocks: they are then of small parameters, whose
    operations cost the host more than the device.

    Args:
        lists: parameters with gradients whose moments are whole, and those whose are in blocks.
        batch_of: from some parameters of one device to what their steps share.
    """
    whole, in_blocks = lists
    joined = group["foreach"] and group["states"] == StateFormat.EIGHT_BIT and bool(rule.moments)
    able: dict[int, list[tuple[Tensor, Kind]]] = defaultdict(list)
    left: tuple[list[Tensor], list[Tensor]] = ([] if joined else whole, [])
    kernels: dict[int, Callable[[Any], None] | None] = {}
    for params, rest, blocks in ((whole if joined else [], left[0], False), (in_blocks, left[1], True)):
        for parameter in params:
            device = parameter.get_device()  # a whole number is looked up faster
            if device not in kernels:
                run = _kernel(rule, parameter.device)
                kernels[device] = None if run is None or not is_right(optimizer, parameter.device) else run
            kind = None
            if kernels[device] is not None and optimizer.is_fusable(parameter):
                kind = _kind(optimizer, parameter, rule.moments, in_blocks=blocks)
            if kind is None:
                rest.append(parameter)
            else:
                able[device].append((parameter, kind))
    for device, found in able.items():
        kernel = kernels[device]
        assert kernel is not None, "only what has a kernel is stepped by it"
        _step_device(batch_of([parameter for parameter, _ in found]), [kind for _, kind in found], rule, kernel)
    return left


def _step_device(about: FusedBatch, kinds: list[Kind], rule: KernelRule, run: Callable[[Any], None]) -> None:
    """A launch for each kind, and for each number of a step where the host knows it."""
    numbers = rule.numbers_of(about)
    steps = numbers["step"]
    known = not isinstance(steps, Tensor)
    alike: dict[tuple[Kind, int | None], list[int]] = defaultdict(list)
    for index, kind in enumerate(kinds):
        alike[kind, steps[index] if known else None].append(index)
    turns: dict[Kind, int] = defaultdict(int)
    for (kind, _), places in alike.items():
        table = _table(about, (kind, turns[kind]))
        turns[kind] += 1
        _refresh(table, about, places, _keys(rule.moments, in_blocks=kind.in_blocks))
        values = {name: value[places[0]] for name, value in numbers.items()} if known else numbers
        now = rule.make(
            table=table, storage=kind.storage, gradient=kind.gradient, in_blocks=kind.in_blocks,
            permuted=kind.permuted, seed=about.seed, scale=about.scale, skip=about.skip, **values, **rule.options,
        )  # fmt: skip
        run(now)


def _kind(optimizer: StoredOptimizer, parameter: Tensor, moments: Sequence[str], *, in_blocks: bool) -> Kind | None:
    """None for a parameter that cannot be stepped together with others."""
    grad, state = parameter.grad, optimizer.state[parameter]
    assert grad is not None, "only parameters with a gradient are stepped"
    count = parameter.numel()
    if parameter.dtype not in _PARAMETERS or grad.dtype not in _GRADIENTS or not count:
        return None
    permuted = _permuted(parameter, grad, state.get(COMPENSATION))
    if permuted is None or not (in_blocks or (not permuted and all(state[name].is_contiguous() for name in moments))):
        return None
    return Kind(optimizer.storage(parameter).value, grad.dtype, in_blocks, permuted, count % 16 == 0)


def _permuted(parameter: Tensor, grad: Tensor, compensation: Tensor | None) -> bool | None:
    """Whether all three lie in channels_last; None if they lie neither so nor in the order of `flatten()`."""
    if parameter.is_contiguous() and grad.is_contiguous() and (compensation is None or compensation.is_contiguous()):
        return False
    form = {4: torch.channels_last, 5: torch.channels_last_3d}.get(parameter.dim())
    if form is None or parameter.numel() >= _LARGEST:  # kernels divide whole numbers of 32 bits
        return None
    tensors = (parameter, grad) if compensation is None else (parameter, grad, compensation)
    return True if all(tensor.is_contiguous(memory_format=form) for tensor in tensors) else None


def _table(about: FusedBatch, key: tuple[Kind, int]) -> PointerTable:
    """The one that such parameters of the group had in the last step. It is compared with what it is to say."""
    tables, device = about.optimizer.tables, about.batch.params[0].device
    whose = (id(about.group), device, *key)
    if whose not in tables:
        tables[whose] = PointerTable(device)
    return tables[whose]


def _keys(moments: Sequence[str], *, in_blocks: bool) -> list[str | None]:
    """Keys of a state for each two columns of moments: codes and scales, or the moment and nothing."""
    if in_blocks:
        return [name + part for name in moments for part in (CODES, SCALES)]
    return [key for name in moments for key in (name, None)]


def _refresh(table: PointerTable, about: FusedBatch, places: list[int], keys: Sequence[str | None]) -> None:
    """Make the table say where the parameters at some places of the batch lie."""
    params = [about.batch.params[place] for place in places]
    states = [about.batch.states[place] for place in places]
    rests = [state.get(COMPENSATION) for state in states]
    shapes = [parameter.shape for parameter in params]
    lines = Lines(
        weights=[parameter.data_ptr() for parameter in params],
        compensations=[0 if rest is None else rest.data_ptr() for rest in rests],
        counts=[parameter.numel() for parameter in params],
        streams=[state.get(STREAM, 0) for state in states],
        channels=[shape[1] if len(shape) > 2 else 1 for shape in shapes],
        pixels=[shape[2:].numel() if len(shape) > 2 else 1 for shape in shapes],
        numbers=places,
        moments=[[0] * len(states) if key is None else [state[key].data_ptr() for state in states] for key in keys],
    )
    table.refresh(lines, [parameter.grad.data_ptr() for parameter in params if parameter.grad is not None])


def _kernel(rule: KernelRule, device: torch.device) -> Callable[[Any], None] | None:
    """None where there is none that steps parameters one by one, either, and while a graph is recorded.

    The graph would have to hold on to the tables.
    """
    return None if rule.alone(device) is None or is_capturing(device) else rule.together(device)
