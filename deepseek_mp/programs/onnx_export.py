"""ONNX files of exported programs: weights in 8 bits stay so, behind DequantizeLinear; INT8 graphs keep their QDQ."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, OutputKind
from torch.utils import _pytree as pytree

from deepseek_mp.backends.exporting_flags import fp32_flags_left_alone
from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.ops.fp8_kinds import KINDS
from deepseek_mp.programs.quiet import quiet
from deepseek_mp.programs.signature import dtype_name
from deepseek_mp.programs.writing import checked, whole_file

OPSET = 20
"""Of the file's operations; FP8 is in it from 19."""
LARGEST = 2**31 - 2**20
"""Bytes of tensors in one file; with more, they lie in one beside it."""
NEEDED = ("onnx", "onnxscript")
_FP32 = 1
_LOOKED_UP = (torch.ops.aten.index.Tensor, torch.ops.aten.embedding.default)
_WEIGHT_ONLY = torch.ops.deepseek_mp.weight_only_linear.default


def export_onnx(path: str | Path, program: ExportedProgram, *, inputs: Sequence[str] | None = None) -> None:
    """Write the program as an ONNX file of opset 20, whole or not at all.

    Args:
        path: an older file there is replaced. Tensors of more than 2 GiB go to `path` with `.data` behind it.
        program: on any device.
        inputs: names of the tensors it is given, in order; None: those of the graph. An output of the same name has
            `output_` in front of it.

    Raises:
        ConfigError: a package is missing (it says which), the path cannot be written, or the program has an operation
            that ONNX has no form for, or outputs that are no tensors.
    """
    require_onnx()
    check_operations(program)
    taken = {str(name) for name in inputs or program.graph_signature.user_inputs}
    # No two values of a file have one name, and runtimes refuse one where an output is named as an input.
    outputs = [f"output_{name}" if name in taken else name for name in _output_names(program)]
    target = checked(path)
    made = _translated(program, list(inputs) if inputs else None, outputs)
    size = sum(value.numel() * value.element_size() for value in program.state_dict.values())
    if size > LARGEST:
        made.save(str(target), external_data=True)
        return
    with whole_file(target) as file:
        file.write(made.model_proto.SerializeToString())


def require_onnx() -> None:
    """`ConfigError` that says what to install, unless it is there."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        passed = f"export to ONNX without {' and '.join(missing)}"
        change = "Install them: pip install 'deepseek-mp[onnx]'"
        raise ConfigError(explain(passed, f"the packages {' and '.join(NEEDED)}", change))


def check_operations(program: ExportedProgram) -> None:
    """`ConfigError` for an operation of this package that is not written to ONNX."""
    for node in program.graph.nodes:
        if str(node.target).startswith("deepseek_mp.") and node.target is not _WEIGHT_ONLY:
            passed = f"{str(node.target).rsplit('.', 1)[0]} in a program for ONNX"
            allowed = "linear layers with weights in int8 or FP8 and activations in 16 bits, and PyTorch's operations"
            raise ConfigError(explain(passed, allowed, "Serve the model in a form of these"))
        table = node.args[0].meta["val"].dtype if node.target in _LOOKED_UP else None
        if table is not None and table in KINDS.values():
            passed = f"a table in {dtype_name(table)} in a program for ONNX"
            raise ConfigError(explain(passed, "tables in int8 or wider", "Name it in keep, or store it in int8"))


def widened(program: ExportedProgram) -> fx.GraphModule:
    """The program's graph with FP32 in place of BF16, which few runtimes of ONNX multiply; called as the program is."""
    module: fx.GraphModule = program.module(check_guards=False)
    made: dict[int, Any] = {}  # a tensor of two names stays one
    for part in module.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if tensor.dtype is torch.bfloat16:
                delattr(part, name)
                if isinstance(tensor, nn.Parameter):  # still: of buffers, which calls write to, copies are kept
                    wide = made.setdefault(id(tensor), nn.Parameter(tensor.detach().float(), requires_grad=False))
                    part.register_parameter(name, wide)
                else:
                    part.register_buffer(name, made.setdefault(id(tensor), tensor.detach().float()))
        if isinstance(part, fx.GraphModule):
            _widen(part)
    return module


def _widen(part: fx.GraphModule) -> None:
    for node in part.graph.nodes:
        node.args, node.kwargs = pytree.tree_map(_wide, (node.args, node.kwargs))
        if node.target is _WEIGHT_ONLY:
            node.update_arg(4, "reference")  # the others multiply 16 bits only
    part.recompile()


def _wide(value: Any) -> Any:
    return torch.float32 if value is torch.bfloat16 else value


def _translated(program: ExportedProgram, inputs: list[str] | None, outputs: list[str]) -> Any:
    table: dict[Any, Any] = {_WEIGHT_ONLY: _weight_only_linear}
    try:
        with fp32_flags_left_alone(), quiet("torch.onnx"):  # about itself and packages that it does not find
            return torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=inputs,
                output_names=outputs,
                custom_translation_table=table,
            )
    except Exception as error:  # whatever the exporter raises for what ONNX has no form for
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        why = f"{type(cause).__name__}: {cause}".strip().splitlines()[0][:300]
        passed = f"a program that has no form in ONNX ({why})"
        raise ConfigError(
            explain(passed, f"operations of opset {OPSET}", "Leave out or rewrite what it names")
        ) from error


def _weight_only_linear(x: Any, q: Any, scale: Any, bias: Any = None, implementation: str = "") -> Any:  # noqa: ARG001
    """The op's own sum: weights widened by their scales, products and sums in FP32, rounded once to the dtype of x."""
    from onnxscript import opset20 as op

    weight, wide = op.DequantizeLinear(q, scale, axis=0), op.Cast(x, to=_FP32)
    rest = () if bias is None else (op.Cast(bias, to=_FP32),)
    return op.CastLike(op.Gemm(wide, weight, *rest, transB=1), x)


def _output_names(program: ExportedProgram) -> list[str]:
    """By where each is in what the program returns: 'logits', 'output', 'output_1'. A None is left out of the file."""
    spec = program.call_spec.out_spec
    assert spec is not None, "an exported program knows what it returns"
    tree = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    names = [named(path) or "output" for path, _ in pytree.tree_flatten_with_path(tree)[0]]
    kept = []
    results = [one.arg for one in program.graph_signature.output_specs if one.kind is OutputKind.USER_OUTPUT]
    for name, result in zip(names, results, strict=True):
        if isinstance(result, ConstantArgument) and result.value is not None:
            passed = f"output {name!r} = {result.value!r} in a program for ONNX"
            raise ConfigError(explain(passed, "tensors", "Leave it out of what the model returns"))
        if not isinstance(result, ConstantArgument):
            kept.append(name)
    return kept


def named(path: Sequence[Any]) -> str:
    """A path in nested containers as one name: keys and places, joined by underscores."""
    parts = [str(part.key if isinstance(part, pytree.MappingKey) else part.idx) for part in path]
    name = "_".join(parts)
    return f"output_{name}" if name[:1].isdigit() else name
