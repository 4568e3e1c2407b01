"""The format of every tensor in a saved model, said in the file, and brought into those that a device has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from deepseek_mp.backends import capabilities
from deepseek_mp.errors import CheckpointError, FormatError, explain
from deepseek_mp.ops import fp8_linear, int4_linear, weight_only
from deepseek_mp.ops.dtypes import format_of
from deepseek_mp.ops.fp8_kinds import KINDS, to_kind
from deepseek_mp.programs.signature import dtype_name

_FP8 = {dtype: kind for kind, dtype in KINDS.items()}
_WEIGHT_ONLY = torch.ops.deepseek_mp.weight_only_linear.default
_FP8_LINEAR = torch.ops.deepseek_mp.fp8_linear.default
_INT4 = torch.ops.deepseek_mp.int4_linear.default
_ASSERT = torch.ops.aten._assert_tensor_metadata.default  # noqa: SLF001


def formats_of(program: ExportedProgram) -> dict[str, dict[str, Any]]:
    """By name of each tensor: its format, sizes, for FP8 the kind (OCP or fnuz), and the name of its scales, if any."""
    scales = dict(_scaled(program))
    return {name: _described(tensor, scales.get(name)) for name, tensor in _tensors(program)}


def check_formats(program: ExportedProgram, expected: Mapping[str, Any]) -> None:
    """`CheckpointError` where the tensors are not in the formats that the file says."""
    found = formats_of(program)
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            passed = f"tensor {name!r}, {found.get(name)}, said to be {expected.get(name)}"
            raise CheckpointError(explain(passed, "the formats that it was saved in", "Save the model again"))


def adapt(program: ExportedProgram, device: torch.device) -> None:
    """Change the program, which is on the device, to the FP8 kind and the implementations that the device has.

    Weights in 4 bits are brought into the order of the implementation, unless more than products reads them.
    `CheckpointError` where they are in one already: what order that is depends on the machine that wrote it.
    """
    _convert_fp8(program, _kind_of(device))
    prepared: set[int] = set()
    for node in _layers(program):
        names = {name: _name_of(program, node.args[_place(node, name)]) for name in _kept_names(node)}
        best = _fastest(node, program.state_dict[names["q"]], device) or "reference"
        if node.target is _INT4 and best == "native" and _is_read_otherwise(program, names["q"]):
            best = "reference"
        if node.target is _INT4 and best == "native":
            _prepare_int4(program, names, prepared)
            node.update_arg(_place(node, "zero"), None)
        node.update_arg(_place(node, "implementation"), best)


def _fastest(node: fx.Node, q: Tensor, device: torch.device) -> str | None:
    dtype = node.meta["val"].dtype
    channels, width = q.shape
    if node.target is _WEIGHT_ONLY:
        return weight_only.fastest(device, dtype, "int8" if q.dtype is torch.int8 else "fp8", width)
    if node.target is _FP8_LINEAR:
        return fp8_linear.fastest(device, dtype, channels, width)
    return int4_linear.fastest(device, dtype, channels, 2 * width) if node.target is _INT4 else None


def _is_read_otherwise(program: ExportedProgram, q: str) -> bool:
    """Whether the graph unpacks the codes too, as for a forward that asks a layer for its weight; it takes their order.

    Args:
        q: a name of the codes.
    """
    return any(user.target is not _INT4 for node in _inputs(program, q) for user in node.users)


def _inputs(program: ExportedProgram, q: str) -> list[fx.Node]:
    """The graph's inputs that stand for the memory of a buffer, whatever their names."""
    where = program.state_dict[q].data_ptr()
    same = {name for name, tensor in program.state_dict.items() if tensor.data_ptr() == where}
    names = program.graph_signature.inputs_to_buffers
    return [node for node in program.graph.nodes if names.get(node.name) in same]


def _prepare_int4(program: ExportedProgram, names: Mapping[str, str], prepared: set[int]) -> None:
    """Under all names of the tensors: a layer that is called twice has two nodes, and one in two places two names.

    `prepared` is where codes lie that are in the order already.
    """
    state = program.state_dict
    codes, scale, zero = (state[names[name]].detach() for name in ("q", "scale", "zero"))
    if codes.data_ptr() in prepared:
        return
    q, scales, _ = int4_linear.prepared(codes, scale, zero, implementation="native")
    prepared.add(q.data_ptr())
    for old, new in ((codes, q), (scale, scales)):
        state.update({name: new for name, one in state.items() if one.data_ptr() == old.data_ptr()})


def _kept_names(node: fx.Node) -> list[str]:
    """Of the arguments that are what a layer keeps of its weight."""
    if node.target is not _INT4:
        return ["q", "scale"]
    if node.args[_place(node, "zero")] is None:
        passed, allowed = "weights in 4 bits in the order of the machine that saved them", "the order of all devices"
        raise CheckpointError(explain(passed, allowed, "Save the model again"))
    return ["q", "scale", "zero"]


def _convert_fp8(program: ExportedProgram, kind: str) -> None:
    """Weights that are widened before they are multiplied; other products with FP8 take OCP's kind alone."""
    for node in _layers(program):
        if node.target is not _WEIGHT_ONLY:
            continue
        names = [_name_of(program, node.args[_place(node, name)]) for name in ("q", "scale")]
        q, scale = (program.state_dict[name].detach() for name in names)
        if _FP8.get(q.dtype, kind) != kind:
            for place in _inputs(program, names[0]):
                _assert_kind(place, q.dtype, kind)
            program.state_dict.update(zip(names, to_kind(q, scale, kind), strict=True))


def _assert_kind(node: fx.Node, was: torch.dtype, kind: str) -> None:
    """The exporter's assertions of what stays in FP8 behind the node, as a forward may read it, say the other kind."""
    for user in tuple(node.users):  # which an update puts in another order
        if user.target is _ASSERT and user.kwargs.get("dtype") is was:
            user.update_kwarg("dtype", KINDS[kind])
        elif getattr(user.meta.get("val"), "dtype", None) is was:
            _assert_kind(user, was, kind)


def _kind_of(device: torch.device) -> str:
    """OCP's, also where there is no FP8 and it is widened, unless the device has the other alone."""
    has = capabilities(device).matmul_formats
    return "fnuz" if "fp8_e4m3fnuz" in has and "fp8_e4m3" not in has else "ocp"


def _described(tensor: Tensor, scale: str | None) -> dict[str, Any]:
    try:
        format = format_of(tensor.dtype)
    except FormatError:  # whole numbers and others that the vocabulary has no word for
        format = dtype_name(tensor.dtype)
    if tensor.dtype is torch.uint8 and scale is not None:
        format = "int4"  # two codes a byte
    about: dict[str, Any] = {"format": format, "shape": list(tensor.shape)}
    if tensor.dtype in _FP8:
        about["kind"] = _FP8[tensor.dtype]
    return about if scale is None else {**about, "scale": scale}


def _tensors(program: ExportedProgram) -> list[tuple[str, Tensor]]:
    constants = [(name, value) for name, value in program.constants.items() if isinstance(value, Tensor)]
    return list({**dict(constants), **program.state_dict}.items())


def _layers(program: ExportedProgram) -> list[fx.Node]:
    """Products of this package with a weight in fewer bits, `q`, and its scales."""
    ours = [node for node in program.graph.nodes if str(node.target).startswith("deepseek_mp.")]
    return [node for node in ours if {"q", "scale", "implementation"} <= set(_arguments(node))]


def _arguments(node: fx.Node) -> list[str]:
    return [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr] # noqa: SLF001


def _place(node: fx.Node, name: str) -> int:
    return _arguments(node).index(name)


def _scaled(program: ExportedProgram) -> Iterator[tuple[str, str]]:
    """Names of tensors that have scales, and of those."""
    for node in _layers(program):
        q, scale = (_name_of(program, node.args[_place(node, name)]) for name in ("q", "scale"))
        yield q, scale


def _name_of(program: ExportedProgram, node: Any) -> str:
    """That of the tensor that an input of the graph stands for."""
    signature = program.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    name: str = names[node.name]
    return name
