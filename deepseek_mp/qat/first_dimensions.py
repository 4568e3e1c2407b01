"""First dimensions of a program's inputs: which of them are free, and from where to where.

Where the model's code asks for a size, the graph has the answer for the example inputs, and no trace of the question.
Ranges of sizes say the most of it, `size_conditions` the rest. A least size of 2 says nothing, since the exporter takes
it for all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from deepseek_mp.nn.nested import map_leaves


def free_sizes_of(program: ExportedProgram, names: Iterable[str]) -> Any:
    """To export another form of it with: in the structure of its arguments, and keyword arguments in that order."""
    args, kwargs = _arguments(program, _values(program))
    return map_leaves((args, {name: kwargs[name] for name in names}), lambda leaf: _dimension(program, leaf))


def free_inputs(program: ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[int, int]:
    """The first sizes of example inputs that may change, by the input's index among these."""
    leaves = pytree.tree_leaves((args, dict(kwargs)))
    return {index: leaves[index].shape[0] for index in _free_values(program, kwargs)}


def equal_sizes(program: ExportedProgram, kwargs: Mapping[str, Any]) -> Iterator[str]:
    """As conditions, which first sizes are one in the graph, such as those of a tensor that was passed twice."""
    first: dict[str, int] = {}
    for index, value in _free_values(program, kwargs).items():
        other = first.setdefault(str(value.shape[0]), index)
        if other != index:
            yield f"t{other}_0 == t{index}_0"


def order_of(program: ExportedProgram, kwargs: Mapping[str, Any]) -> list[int]:
    """For each of the example inputs, its index among those of the program: names may have another order there."""
    by_place, by_name = _arguments(program, range(len(_user_inputs(program))))
    return pytree.tree_leaves((by_place, {name: by_name[name] for name in kwargs}))


def _user_inputs(program: ExportedProgram) -> list[Any]:
    return [spec.arg for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]


def _values(program: ExportedProgram) -> list[Any]:
    """What stands in the graph for each of its inputs."""
    values = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    return [values.get(one.name) for one in _user_inputs(program)]


def _arguments(program: ExportedProgram, leaves: Iterable[Any]) -> tuple[Any, dict[str, Any]]:
    """In the structure of the program's arguments."""
    spec = program.call_spec.in_spec
    assert spec is not None, "an exported program knows what it takes"
    args, kwargs = pytree.tree_unflatten(list(leaves), spec)
    return args, kwargs


def _free_values(program: ExportedProgram, kwargs: Mapping[str, Any]) -> dict[int, Tensor]:
    """Those whose first size may change, by the index among the example inputs."""
    values = _values(program)
    return {index: values[at] for index, at in enumerate(order_of(program, kwargs)) if _is_free(values[at])}


def _is_free(value: Any) -> bool:
    if not isinstance(value, Tensor) or not value.dim():
        return False
    size: Any = value.shape[0]
    return isinstance(size, torch.SymInt) and not size.node.expr.is_number


def _dimension(program: ExportedProgram, value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.dim():
        return None
    if not _is_free(value):
        return {0: torch.export.Dim.STATIC}
    size: Any = value.shape[0]
    found = program.range_constraints.get(size.node.expr)
    if found is None:  # a multiple of another
        return {0: torch.export.Dim.AUTO}
    most = int(found.upper) if found.upper.is_Integer else None
    return {0: torch.export.Dim.AUTO(min=int(found.lower), max=most)}
