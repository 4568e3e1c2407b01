"""The casts that compute their tensor themselves, declared once: `quantise_made`, `quantise_gate_grads`, both delayed.

A tensor that only casts read need not be stored: the cast computes it of what it is made of, as `ops.sources`
says, in fp32 and without rounding in between. Implementations are those of `quantise`; which granularities each
has, `ops.sources.can_make` tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.errors import ConfigError, ShapeError, explain
from deepseek_mp.ops.choose import made_of
from deepseek_mp.ops.operands import Cast, Operands, cast_of_value, check_magnitude, check_matrix, empty_operands
from deepseek_mp.ops.sources import ACTIVATIONS, can_make, check_count, find_source

Pair = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""The operands of two matrices, and a third one transposed with its scales."""

_library = torch.library.Library("deepseek_mp", "FRAGMENT")
_RESULTS = "(" + ", ".join(["Tensor"] * 4) + ")"
_BOTH_RESULTS = "(" + ", ".join(["Tensor"] * 10) + ")"
_SCHEMAS = {
    "quantise_made": "(Tensor[] inputs, str source, str format, str granularity, bool power_of_two, bool rows,"
    f" bool columns, str implementation) -> {_RESULTS}",
    "quantise_made_delayed": "(Tensor[] inputs, str source, Tensor top, Tensor(a!) amax, str format,"
    f" bool power_of_two, bool rows, bool columns, *, str implementation) -> {_RESULTS}",
    "quantise_gate_grads": "(Tensor x, Tensor up, Tensor g, str activation, str format, str granularity,"
    f" bool power_of_two, bool rows, bool columns, str implementation, *, str? value_format=None) -> {_BOTH_RESULTS}",
    "quantise_gate_grads_delayed": "(Tensor x, Tensor up, Tensor g, Tensor x_top, Tensor(a!) x_amax, Tensor up_top,"
    " Tensor(b!) up_amax, str activation, str format, bool power_of_two, bool rows, bool columns, *,"
    f" str implementation, str? value_format=None, Tensor? value_top=None) -> {_BOTH_RESULTS}",
}


def quantise_made(
    inputs: Sequence[Tensor],
    source: str,
    format: str,
    granularity: str,
    power_of_two: bool,
    rows: bool,
    columns: bool,
    *,
    implementation: str,
) -> Operands:
    """`quantise` of `ops.sources.compute(source, inputs)`.

    Args:
        inputs: what the source reads, each [M, K] in fp32, bf16 or fp16, contiguous, all of one type.
        source: a name of `ops.sources.SOURCES`.
        format, granularity, power_of_two, rows, columns: as for `quantise`.
        implementation: reference or triton; triton for 1x128 and 128x128 only.

    Returns:
        What `quantise` returns.

    Raises:
        ShapeError: the inputs are no contiguous matrices of one shape whose width consists of whole groups.
        FormatError: the format is not one of FP8.
        ConfigError: there is no such source, it reads another number of tensors, the inputs differ in type or
            device, or the implementation does not have the granularity.
    """
    made: Operands = torch.ops.deepseek_mp.quantise_made(
        inputs, source, format, granularity, power_of_two, rows, columns, implementation
    )
    return made


def quantise_made_delayed(
    inputs: Sequence[Tensor],
    source: str,
    top: Tensor,
    amax: Tensor,
    *,
    format: str,
    power_of_two: bool,
    rows: bool,
    columns: bool,
    implementation: str,
) -> Operands:
    """`quantise_delayed` of `ops.sources.compute(source, inputs)`.

    Args:
        inputs, source: as for `quantise_made`, with a width that is a multiple of 16.
        top: fp32 [], the magnitude that the scale has to hold; 0: not known, then it is that of the source.
        amax: fp32 [], raised to the largest finite magnitude of the source if it is below.
        format, power_of_two, rows, columns: as for `quantise`.
        implementation: reference or triton.

    Returns:
        What `quantise` returns.

    Raises:
        ShapeError, FormatError, ConfigError: as `quantise_made` and `quantise_delayed`.
    """
    made: Operands = torch.ops.deepseek_mp.quantise_made_delayed(
        inputs, source, top, amax, format, power_of_two, rows, columns, implementation=implementation
    )
    return made


def quantise_gate_grads(
    x: Tensor,
    up: Tensor,
    g: Tensor,
    activation: str,
    *,
    format: str,
    granularity: str,
    power_of_two: bool,
    rows: bool,
    columns: bool,
    implementation: str,
    value_format: str | None = None,
) -> Pair:
    """Both gradients of f(x) * up, quantised: that with respect to x and that with respect to up.

    On request also f(x) * up itself, transposed: what the layer behind it multiplies its output gradient with, and
    need not be kept for that since it is computed of the same x and up.

    Args:
        x, up, g: the arguments and the gradient of the result, each [M, K] as for `quantise_made`.
        activation: f, a name of `ops.sources.ACTIVATIONS`.
        format, granularity, power_of_two, rows, columns, implementation: as for `quantise_made`.
        value_format: the format of f(x) * up; None: it is not made.

    Returns:
        What `quantise_made` returns for `<activation>_gate_grad` of (x, up, g), then for `<activation>_gate` of (x, g);
        then the transposed values and scales for `<activation>_gate` of (x, up), or two empty tensors [0].

    Raises:
        ShapeError, FormatError, ConfigError: as `quantise_made`.
    """
    made: Pair = torch.ops.deepseek_mp.quantise_gate_grads(
        x, up, g, activation, format, granularity, power_of_two, rows, columns, implementation,
        value_format=value_format,
    )  # fmt: skip
    return made


def quantise_gate_grads_delayed(
    x: Tensor,
    up: Tensor,
    g: Tensor,
    x_top: Tensor,
    x_amax: Tensor,
    up_top: Tensor,
    up_amax: Tensor,
    *,
    activation: str,
    format: str,
    power_of_two: bool,
    rows: bool,
    columns: bool,
    implementation: str,
    value_format: str | None = None,
    value_top: Tensor | None = None,
) -> Pair:
    """`quantise_gate_grads` with one scale for each gradient, taken from a magnitude that is known beforehand.

    Args:
        x, up, g, activation: as for `quantise_gate_grads`, with a width that is a multiple of 16.
        x_top, x_amax: `top` and `amax` of the gradient with respect to x; see `quantise_made_delayed`.
        up_top, up_amax: those of the gradient with respect to up.
        format, power_of_two, rows, columns, implementation: as for `quantise_made_delayed`.
        value_format: as for `quantise_gate_grads`.
        value_top: `top` of f(x) * up; needed with `value_format`. Its magnitude is noted by nobody a second time.

    Returns:
        What `quantise_gate_grads` returns.

    Raises:
        ShapeError, FormatError, ConfigError: as `quantise_made_delayed`.
    """
    made: Pair = torch.ops.deepseek_mp.quantise_gate_grads_delayed(
        x, up, g, x_top, x_amax, up_top, up_amax, activation, format, power_of_two, rows, columns,
        implementation=implementation, value_format=value_format, value_top=value_top,
    )  # fmt: skip
    return made


def _quantise_made(inputs: Sequence[Tensor], source: str, *how: Any) -> Operands:
    *settings, implementation = how
    cast = _checked(inputs, source, Cast(*settings), implementation, settings[1])
    made: Operands = made_of("quantise_made", implementation)(inputs, source, cast)
    return made


def _quantise_made_delayed(
    inputs: Sequence[Tensor], source: str, top: Tensor, amax: Tensor, *how: Any, implementation: str
) -> Operands:
    cast = _checked(inputs, source, _delayed(how), implementation, "delayed")
    for name, number in (("top", top), ("amax", amax)):
        check_magnitude(name, number, inputs[0])
    made: Operands = made_of("quantise_made_delayed", implementation)(inputs, source, top, amax, cast)
    return made


def _quantise_gate_grads(
    x: Tensor, up: Tensor, g: Tensor, activation: str, *how: Any, value_format: str | None = None
) -> Pair:
    *settings, implementation = how
    _check_activation(activation)
    cast = _checked((x, up, g), f"{activation}_gate_grad", Cast(*settings), implementation, settings[1])
    _check_value(x, value_format, cast)
    made: Pair = made_of("quantise_gate_grads", implementation)((x, up, g), activation, cast, value_format)
    return made


def _quantise_gate_grads_delayed(
    x: Tensor,
    up: Tensor,
    g: Tensor,
    x_top: Tensor,
    x_amax: Tensor,
    *rest: Any,
    implementation: str,
    value_format: str | None = None,
    value_top: Tensor | None = None,
) -> Pair:
    up_top, up_amax, activation, *how = rest
    _check_activation(activation)
    cast = _checked((x, up, g), f"{activation}_gate_grad", _delayed(how), implementation, "delayed")
    for name, number in (("x_top", x_top), ("x_amax", x_amax), ("up_top", up_top), ("up_amax", up_amax)):
        check_magnitude(name, number, x)
    _check_value(x, value_format, cast)
    if value_format is not None:
        if value_top is None:
            raise ConfigError(explain("a value_format without a value_top", "both or none", "Pass the top too"))
        check_magnitude("value_top", value_top, x)
    run = made_of("quantise_gate_grads_delayed", implementation)
    made: Pair = run((x, up, g), activation, (x_top, up_top, value_top), (x_amax, up_amax), cast, value_format)
    return made


def _check_value(x: Tensor, format: str | None, cast: Cast) -> None:
    if format is not None:
        check_matrix(x, format, cast.granularity)


def _delayed(how: Sequence[Any]) -> Cast:
    """The arguments `format, power_of_two, rows, columns` of an op with one scale for the tensor."""
    format, *layouts = how
    return Cast(format, "tensor", *layouts)


def _checked(inputs: Sequence[Tensor], source: str, cast: Cast, implementation: str, kind: str) -> Cast:
    """The cast, if it can be made of these inputs; `kind` is its granularity or "delayed"."""
    find_source(source)
    check_count(source, len(inputs))
    first = inputs[0]
    for tensor in inputs:
        check_matrix(tensor, cast.format, cast.granularity)
        if tensor.shape != first.shape:
            passed = f"inputs of {source!r} of shapes {list(first.shape)} and {list(tensor.shape)}"
            raise ShapeError(explain(passed, "one shape", "Expand them first"))
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            passed = f"inputs of {source!r}: {first.dtype} on {first.device} and {tensor.dtype} on {tensor.device}"
            raise ConfigError(explain(passed, "one type and one device", "Convert them first"))
    made_of("quantise_made", implementation)  # an unknown name says so
    if not can_make(kind, implementation):
        passed = f"{kind} scales for what {implementation} computes itself"
        raise ConfigError(explain(passed, "1x128, 128x128, delayed", "Compute the tensor and call quantise"))
    return cast


def _check_activation(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ConfigError(explain(f"activation {activation!r}", ", ".join(ACTIVATIONS), "Use one of these"))


def _made_shapes(inputs: Sequence[Tensor], *rest: Any) -> Operands:
    _source, *how, _implementation = rest
    return empty_operands(inputs[0], Cast(*how))


def _made_delayed_shapes(inputs: Sequence[Tensor], *rest: Any, **_: Any) -> Operands:
    _source, _top, _amax, *how = rest
    return empty_operands(inputs[0], _delayed(how))


def _gate_grads_shapes(x: Tensor, *rest: Any, value_format: str | None = None) -> Pair:
    _up, _g, _activation, *how, _implementation = rest
    return _three(x, Cast(*how), value_format)


def _gate_grads_delayed_shapes(x: Tensor, *rest: Any, value_format: str | None = None, **_: Any) -> Pair:
    return _three(x, _delayed(rest[-4:]), value_format)


def _three(x: Tensor, cast: Cast, value_format: str | None) -> Pair:
    value = empty_operands(x, cast_of_value(cast, value_format))
    return *empty_operands(x, cast), *empty_operands(x, cast), *value[2:]


for _name, _run, _shapes in (
    ("quantise_made", _quantise_made, _made_shapes),
    ("quantise_made_delayed", _quantise_made_delayed, _made_delayed_shapes),
    ("quantise_gate_grads", _quantise_gate_grads, _gate_grads_shapes),
    ("quantise_gate_grads_delayed", _quantise_gate_grads_delayed, _gate_grads_delayed_shapes),
):
    _library.define(_name + _SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"deepseek_mp::{_name}", _shapes, lib=_library)
