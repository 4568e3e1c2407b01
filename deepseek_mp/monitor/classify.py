"""One dispatched operation -> its name and the number format it ran in.

The rule, for an operation that PyTorch dispatches on a sampled step:

- what computes nothing is not counted: views, changes of shape or storage, allocations, and the
  reading of one value by the host;
- a conversion between formats is `cast`, with the format `to<-from`; so is quantising, whose scales
  and second layout are parts of it;
- a matrix product, convolution, attention or recurrent layer has the format of its operands, the
  narrowest floating type among its inputs (scales and statistics beside them are wider; of two kinds
  of FP8 it is the left operand's). With FP32 operands it is what the FP32 flags of the device make of
  it: fp32, tf32, hf32 or bf16;
- anything else has the type of its floating inputs. Tensors without dimensions count only if there
  are no others, as in PyTorch's type promotion. If the inputs differ in type, or the result is
  wider than they are (`sum(x, dtype=...)`), it is the type of the first floating result;
- without floating inputs it is the type of the result, and without that too it is `integer`;
- a complex number counts in the format of its two parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch._ops import OpOverload

from deepseek_mp.backends import fp32_mode
from deepseek_mp.errors import FormatError
from deepseek_mp.monitor.counts import CAST
from deepseek_mp.ops.dtypes import format_of
from deepseek_mp.precision import FORMATS

INTEGER = "integer"
Product = Literal["matmul", "conv", "rnn", "attention"]

_NOTHING = frozenset({
    "_unsafe_view", "lift", "lift_fresh", "resize_", "resize_as_", "set_", "record_stream", "is_same_size", "is_pinned",
    "_local_scalar_dense", "equal", "_resize_output_", "sparse_resize_", "size", "stride", "numel", "dim",
    "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "_efficientzerotensor",
})  # fmt: skip
_WRITES_ONLY = frozenset({
    "fill_", "zero_", "bernoulli_", "uniform_", "normal_", "random_", "exponential_", "log_normal_", "cauchy_",
    "geometric_", "ones_like", "zeros_like", "full_like", "rand_like", "randn_like", "randint_like",
    "new_ones", "new_zeros", "new_full",
})  # fmt: skip
_FRESH_CASTS = frozenset({
    "_to_copy", "to", "deepseek_mp::quantise", "deepseek_mp::quantise_delayed", "deepseek_mp::quantise_made",
    "deepseek_mp::quantise_made_delayed", "deepseek_mp::quantise_gate_grads",
    "deepseek_mp::quantise_gate_grads_delayed",
})  # fmt: skip
"""Their result is a new tensor; the others write into their first input."""
_CASTS = _FRESH_CASTS | {"copy_", "copy", "_foreach_copy_"}
_PRODUCTS: dict[str, Product] = {
    **dict.fromkeys(
        ("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot", "matmul", "linear", "einsum",
         "linear_backward", "matmul_backward", "_addmm_activation", "addmm_", "baddbmm_", "bilinear", "tensordot",
         "_scaled_mm", "_scaled_mm_v2", "_grouped_mm", "_scaled_grouped_mm", "_scaled_grouped_mm_v2",
         "deepseek_mp::product"),
        "matmul",
    ),
    **dict.fromkeys(
        ("convolution", "convolution_backward", "_convolution", "convolution_overrideable",
         "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
         "conv_tbc", "conv_tbc_backward",
         "mkldnn_convolution", "cudnn_convolution", "cudnn_convolution_transpose", "miopen_convolution",
         "miopen_convolution_transpose", "miopen_depthwise_convolution", "_conv_depthwise2d"),
        "conv",
    ),
    **dict.fromkeys(
        ("_cudnn_rnn", "_cudnn_rnn_backward", "miopen_rnn", "miopen_rnn_backward", "mkldnn_rnn_layer",
         "mkldnn_rnn_layer_backward", "_lstm_mps", "lstm_mps_backward"),
        "rnn",
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ran:
    """What one dispatched operation was."""

    op: str
    format: str
    device: torch.device | None
    reads: bool
    """It computes with the values of floating inputs, or its backward may: not a cast, and more than a fill."""
    complex: bool = False

    @property
    def wide(self) -> bool:
        """Wider than 16 bits in memory."""
        return self.format in FORMATS and FORMATS[self.format].is_float and FORMATS[self.format].storage_bits > 16


@cache
def format_name(dtype: torch.dtype) -> str:
    """The format's name in this package's vocabulary, or the type's own name where it has none."""
    part = dtype.to_real() if dtype.is_complex else dtype
    if not part.is_floating_point:
        return INTEGER
    try:
        return format_of(part)
    except FormatError:  # a floating type that no recipe uses, as packed 4-bit pairs
        return str(part).removeprefix("torch.")


@cache
def op_name(func: Any) -> str:
    """Name without overload; only other libraries' operations keep their namespace."""
    name: str = func.name() if isinstance(func, OpOverload) else str(func)
    namespace, _, op = name.rpartition("::")
    return op.split(".")[0] if namespace in ("", "aten") else f"{namespace}::{op.split('.')[0]}"


@cache
def computes(func: Any) -> bool:
    """Whether the operation is counted."""
    if not isinstance(func, OpOverload):
        return True
    if func.is_view or torch.Tag.inplace_view in func.tags or func.namespace == "prim":
        return False
    name = op_name(func)
    return name not in _NOTHING and not name.startswith("sym_")


def classify(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Ran:
    """Name and format of an operation that ran; see the rule above. Reads types and shapes only, never values."""
    op = op_name(func)
    inputs = list(_tensors((*args, *kwargs.values())))
    results = list(_tensors((out,)))
    device = next((tensor.device for tensor in (*results, *inputs)), None)
    is_complex = any(tensor.is_complex() for tensor in (*inputs, *results))
    if op in _CASTS:
        source, target = _ends_of_cast(op, inputs, results)
        if source != target:
            return Ran(CAST, f"{target}<-{source}", device, reads=False, complex=is_complex)
    floats = [tensor for tensor in inputs if _is_floating(tensor)]
    dtype = _running_type(floats, [tensor for tensor in results if _is_floating(tensor)], product(op))
    if dtype is None:
        return Ran(op, INTEGER, device, reads=False)
    format = format_name(dtype)
    kind = product(op)
    if kind in ("matmul", "conv", "rnn") and format == "fp32" and device is not None and not is_complex:
        mode = fp32_mode(device, kind)
        format = format if mode == "ieee" else mode
    # A view computes only in its backward; without gradients, as inside an autograd function, it has none.
    reads = bool(floats) and op not in _WRITES_ONLY and (computes(func) or torch.is_grad_enabled())
    return Ran(op, format, device, reads=reads, complex=is_complex)


def _ends_of_cast(op: str, inputs: list[Tensor], results: list[Tensor]) -> tuple[str, str]:
    """Formats of the source and of the target; equal where nothing is converted."""
    into = op not in _FRESH_CASTS
    source = inputs[len(inputs) // 2 if into else 0]
    target = inputs[0] if into else results[0]
    return format_name(source.dtype), format_name(target.dtype)


def product(op: str) -> Product | None:
    """Which kind of product the operation is, None if it is none."""
    return "attention" if op.startswith("_scaled_dot_product") else _PRODUCTS.get(op)


def _running_type(floats: list[Tensor], results: list[Tensor], kind: Product | None) -> torch.dtype | None:
    inputs = _distinct([tensor for tensor in floats if tensor.dim()] or floats)
    if not inputs:
        return results[0].dtype if results else None
    if kind is not None:
        return min(inputs, key=_width)
    if results and (len(inputs) > 1 or _width(results[0].dtype) > _width(inputs[0])):
        return results[0].dtype
    return inputs[0] if len(inputs) == 1 else max(inputs, key=_width)


def _width(dtype: torch.dtype) -> int:
    return dtype.to_real().itemsize if dtype.is_complex else dtype.itemsize


def _distinct(tensors: list[Tensor]) -> list[torch.dtype]:
    return list(dict.fromkeys(tensor.dtype for tensor in tensors))


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors among the values and inside lists and tuples of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
