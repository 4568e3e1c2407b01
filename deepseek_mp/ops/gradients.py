"""The gradients of one optimizer step: their norm, their largest magnitude, their unscaling.

Everything is computed on the device and stays there as 0-dim tensors, so that nothing here waits for
it. A gradient may be dense or sparse, real or complex, of any floating dtype and on any device; the
results are float32 (float64 if one of them is) on the device of the first gradient.

One pass serves two purposes: the L2 norm is what clipping and the records need, and it is finite
exactly when every gradient is (a finite gradient above 1.8e19 also makes a float32 norm overflow;
a step with such a gradient is not worth applying either).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def gradient_views(params: Iterable[Tensor]) -> list[Tensor]:
    """The gradients of `params` as dense real tensors that share their memory.

    A sparse gradient is coalesced in place first: duplicate entries can be finite each and
    overflow when summed, and only the sum is what the optimizer applies.
    """
    views = []
    for param in params:
        grad = param.grad
        if grad is None:
            continue
        if grad.is_sparse:
            param.grad = grad = grad.coalesce()
            grad = grad._values()  # noqa: SLF001 - values() is a copy that autograd tracks; this is the memory itself
        views.append(torch.view_as_real(grad) if grad.is_complex() else grad)
    return views


def _by_device(grads: Sequence[Tensor]) -> dict[torch.device, list[Tensor]]:
    groups: dict[torch.device, list[Tensor]] = defaultdict(list)
    for grad in grads:
        groups[grad.device].append(grad)
    return groups


def _norms(grads: Sequence[Tensor], order: float) -> Tensor:
    """The norm of each gradient, as one vector on the device of the first."""
    # The sum of squares is taken in float32 whatever the dtype of the gradient: a norm of 1e5 does
    # not fit in fp16, and clipping by an infinite norm would set every gradient to zero.
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    home = grads[0].device
    parts = [
        torch.stack(torch._foreach_norm(group, order, dtype=dtype)).to(home, non_blocking=True)  # noqa: SLF001
        for group in _by_device(grads).values()
    ]
    return torch.cat(parts)


def l2_norm(grads: Sequence[Tensor]) -> Tensor:
    """Square root of the sum of squares over all gradients, 0-dim; non-finite if any of them is."""
    return torch.sqrt(_norms(grads, 2.0).square().sum())


def largest_magnitude(grads: Sequence[Tensor]) -> Tensor:
    """Largest absolute value over all gradients, 0-dim; NaN if any element is NaN."""
    return _norms([g for g in grads if g.numel()] or [grads[0].new_zeros(1)], float("inf")).max()


def multiply_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply every gradient in place by a 0-dim factor."""
    with torch.no_grad():
        for device, group in _by_device(grads).items():
            torch._foreach_mul_(group, factor.to(device, non_blocking=True))
