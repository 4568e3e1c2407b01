"""Max pooling in two dimensions as ops of ours, `max_pool2d` and its backward, for training.

What the compiler makes of a pool is slow on GPUs; in torch 2.13 it adds gradients up atomically, at indices of 64 bits.
Here the forward notes in one byte which cell of its window each output came from. The backward goes the other way: each
input looks at the windows that hold it and sums, in their order, the gradients of those that named it; in fp32 (fp64 of
fp64), rounded once. Nothing is added atomically, so the same inputs give the same bits, and the input itself is not
kept. Numbers are PyTorch's: ties go to the first cell, a NaN wins over all before it, beyond the edges is -inf.

Both ops give channels_last tensors, whatever they get. An autograd formula joins them; that of the backward reads a
gradient at the named cells, by PyTorch's own operations, so that there are derivatives of any order.
On an H200 the stem of ResNet-50 (256 images, BF16) takes 0.25 and 0.19 ms, PyTorch's pool 0.82 and 1.94, the compiler's
0.36 and 1.45 (`benchmarks/max_pool.py`).

The compiler takes an op that it does not know for free to compute again, unless it has a number of operations: under a
budget for activations, a pool then comes after elementwise work and before products.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from deepseek_mp.errors import ShapeError, explain
from deepseek_mp.ops.choose import kernel_runs, max_pool_of
from deepseek_mp.ops.pool_window import PoolWindow, channels_last

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the Triton kernels take; the reference takes all floating types."""

_library = torch.library.Library("deepseek_mp", "FRAGMENT")
_WINDOW = "int[2] kernel_size, int[2] stride, int[2] padding, bool ceil_mode, str implementation"


def max_pool2d(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    *,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """The largest value of each window, and where in the window it is.

    Args:
        x: [N, C, H, W], floating; triton: fp32, bf16 or fp16.
        kernel_size, stride, padding: each down and across; at most 255 cells. Dilation is 1.
        ceil_mode: as for `torch.nn.functional.max_pool2d`.
        implementation: reference or triton. Triton copies an x whose channels are not innermost in memory.

    Returns:
        Values [N, C, H', W'] in the dtype of x, and offsets, uint8, of the same shape: row * (width of the kernel) +
        column of the cell, counted from the window's corner, the padding included.

    Raises:
        ShapeError, ConfigError: as `PoolWindow.of` and `PoolWindow.empty_results`.
    """
    made: tuple[Tensor, Tensor] = torch.ops.deepseek_mp.max_pool2d(
        x, kernel_size, stride, padding, ceil_mode, implementation
    )
    return made


def max_pool2d_backward(
    g: Tensor,
    offsets: Tensor,
    size: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    *,
    implementation: str,
) -> Tensor:
    """The gradient with respect to the input of `max_pool2d`.

    Args:
        g: the gradient of the values, [N, C, H', W'].
        offsets: as `max_pool2d` gave them.
        size: H and W of the input.
        kernel_size, stride, padding, ceil_mode, implementation: as for `max_pool2d`.

    Returns:
        [N, C, H, W] in the dtype of g.

    Raises:
        ShapeError: the shapes of g, offsets and size do not belong together.
        ConfigError: as `PoolWindow.of`.
    """
    made: Tensor = torch.ops.deepseek_mp.max_pool2d_backward(
        g, offsets, size, kernel_size, stride, padding, ceil_mode, implementation
    )
    return made


def fastest(device: torch.device, dtype: torch.dtype) -> str | None:
    """The implementation to use instead of PyTorch's own pool; None: its own is to stay."""
    return "triton" if dtype in KERNEL_TYPES and _kernels_run(device) else None


@cache
def _kernels_run(device: torch.device) -> bool:
    def once() -> None:
        window = PoolWindow.of((2, 2), (2, 2), (0, 0), False)
        values, offsets = max_pool_of("max_pool2d", "triton")(torch.ones(1, 8, 2, 2, device=device), window)
        max_pool_of("max_pool2d_backward", "triton")(values, offsets, (2, 2), window)

    return kernel_runs(device, "max pooling in training", once)


def _forward(x: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    *window, implementation = how
    made: tuple[Tensor, Tensor] = max_pool_of("max_pool2d", implementation)(x, PoolWindow.of(*window))
    return made


def _backward(g: Tensor, offsets: Tensor, size: Sequence[int], *how: Any) -> Tensor:
    *given, implementation = how
    window = PoolWindow.of(*given)
    _check(g, offsets, size, window)
    made: Tensor = max_pool_of("max_pool2d_backward", implementation)(g, offsets, tuple(size), window)
    return made


def _check(g: Tensor, offsets: Tensor, size: Sequence[int], window: PoolWindow) -> None:
    if g.shape != offsets.shape or g.dim() != 4 or tuple(g.shape[2:]) != window.output_size(*size):
        passed = f"a gradient {list(g.shape)} with offsets {list(offsets.shape)} of a pool of {list(size)}"
        raise ShapeError(explain(passed, "both of the size of the pool's outputs", "Pass the size of its input"))


def _forward_shapes(x: Tensor, *how: Any) -> tuple[Tensor, Tensor]:
    return PoolWindow.of(*how[:-1]).empty_results(x)


def _backward_shapes(g: Tensor, _offsets: Tensor, size: Sequence[int], *_how: Any) -> Tensor:
    return channels_last((*g.shape[:2], *size), g, g.dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *ctx.how = inputs
    ctx.size = x.shape[2:]
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, g: Tensor | None, _of_offsets: None) -> tuple[Tensor | None, ...]:
    gradient = None
    if g is not None:
        (offsets,) = ctx.saved_tensors
        gradient = torch.ops.deepseek_mp.max_pool2d_backward(g, offsets, ctx.size, *ctx.how)
    return gradient, *(None for _ in ctx.how)


def _keep_offsets(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - as PyTorch calls it
    _g, offsets, _size, *how = inputs
    ctx.window, ctx.arguments = PoolWindow.of(*how[:-1]), len(inputs)
    ctx.save_for_backward(offsets)


def _differentiate_again(ctx: Any, of_inputs: Tensor) -> tuple[Tensor | None, ...]:
    """What the backward gave goes to where it came from: each output gets that of the cell it named."""
    (offsets,) = ctx.saved_tensors
    places = ctx.window.places(offsets, of_inputs.shape[3])
    gradient = of_inputs.flatten(2).gather(2, places.flatten(2)).view(offsets.shape)
    return gradient, *(None for _ in range(ctx.arguments - 1))


for _name, _arguments, _results, _run, _shapes in (
    ("max_pool2d", "Tensor x", "(Tensor, Tensor)", _forward, _forward_shapes),
    ("max_pool2d_backward", "Tensor g, Tensor offsets, SymInt[2] size", "Tensor", _backward, _backward_shapes),
):
    _library.define(f"{_name}({_arguments}, {_WINDOW}) -> {_results}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"deepseek_mp::{_name}", _shapes, lib=_library)
for _name, _formula, _setup in (
    ("max_pool2d", _differentiate, _keep),
    ("max_pool2d_backward", _differentiate_again, _keep_offsets),
):
    torch.library.register_autograd(f"deepseek_mp::{_name}", _formula, setup_context=_setup, lib=_library)


@register_flop_formula(torch.ops.deepseek_mp.max_pool2d)
def _operations(x: Sequence[int], *how: Any, **_: Any) -> int:
    """Comparisons: one for each cell of each window."""
    window = PoolWindow.of(*how[:-1])
    down, across = window.output_size(*x[2:])
    return x[0] * x[1] * down * across * window.kernel[0] * window.kernel[1]
