"""First dimensions of a program's inputs: which of them are free, and from where to where.

Where the model's code asks for a size, the graph has the answer for the example inputs, and no trace of the question.
Ranges of sizes say the most of it. A least size of 2 says nothing, since the exporter takes it for all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from deepseek_mp.nn.nested import map_leaves


def free_sizes_of(program: ExportedProgram, names: Iterable[str]) -> Any:
    """To export another form of it with: in the structure of its arguments, and keyword arguments in that order."""
    values = {node.name: node.meta.get("val") for node in program.graph.find_nodes(op="placeholder")}
    inputs = [spec.arg for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    spec = program.call_spec.in_spec
    assert spec is not None, "an exported program knows what it takes"
    args, kwargs = pytree.tree_unflatten([values.get(one.name) for one in inputs], spec)
    return map_leaves((args, {name: kwargs[name] for name in names}), lambda leaf: _dimension(program, leaf))


def _dimension(program: ExportedProgram, value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.dim():
        return None
    size: Any = value.shape[0]
    if not isinstance(size, torch.SymInt) or size.node.expr.is_number:
        return {0: torch.export.Dim.STATIC}
    found = program.range_constraints.get(size.node.expr)
    if found is None:  # a multiple of another
        return {0: torch.export.Dim.AUTO}
    most = int(found.upper) if found.upper.is_Integer else None
    return {0: torch.export.Dim.AUTO(min=int(found.lower), max=most)}
