"""The gradients of one optimizer step: their norms, what they are over Adam's second moment, their unscaling.

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

from deepseek_mp.ops.moved import moved

LARGE = 1 << 20
"""Values of a gradient that is worth all cores of a CPU."""
ROWS = 512
"""That its norm is taken of first; more than there are cores."""


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
            grad = grad._values()
        views.append(torch.view_as_real(grad) if grad.is_complex() else grad)
    return views


Kind = tuple[torch.device, torch.dtype]


def _by_kind(grads: Sequence[Tensor]) -> dict[Kind, list[Tensor]]:
    """By device and dtype: of several dtypes at once PyTorch would take each norm by itself."""
    groups: dict[Kind, list[Tensor]] = defaultdict(list)
    for grad in grads:
        groups[grad.device, grad.dtype].append(grad)
    return groups


def norms(grads: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """The norm of each gradient, as one vector on the device of the first, in their order; `order` 2 or infinity."""
    # The sum of squares is taken in float32 whatever the dtype of the gradient: a norm of 1e5 does
    # not fit in fp16, and clipping by an infinite norm would set every gradient to zero.
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
    home, groups = grads[0].device, _by_kind(grads)
    found = {kind: iter(_norms_on(kind[0], group, order, dtype)) for kind, group in groups.items()}
    return torch.stack([moved(next(found[grad.device, grad.dtype]), home) for grad in grads])


def _norms_on(place: torch.device, grads: Sequence[Tensor], order: float, dtype: torch.dtype) -> Sequence[Tensor]:
    """Those of the gradients of one device and dtype."""
    if place.type != "cpu" or all(grad.numel() < LARGE for grad in grads):
        return torch._foreach_norm(list(grads), order, dtype=dtype)
    return [_norm_by_rows(grad, order, dtype) for grad in grads]


def _norm_by_rows(grad: Tensor, order: float, dtype: torch.dtype) -> Tensor:
    """On a CPU, where PyTorch reduces a tensor to one number on one core, and to several numbers on all."""
    if grad.numel() < LARGE or not grad.is_contiguous():
        own: Tensor = torch.linalg.vector_norm(grad, order, dtype=dtype)
        return own
    flat = grad.view(-1)
    whole = flat.numel() - flat.numel() % ROWS
    parts = torch.linalg.vector_norm(flat[:whole].view(ROWS, -1), order, dim=1, dtype=dtype)
    if whole < flat.numel():
        parts = torch.cat([parts, torch.linalg.vector_norm(flat[whole:], order, dtype=dtype)[None]])
    norm: Tensor = torch.linalg.vector_norm(parts, order)
    return norm


def l2_norm(grads: Sequence[Tensor]) -> Tensor:
    """Square root of the sum of squares over all gradients, 0-dim; non-finite if any of them is."""
    return l2_norm_of(norms(grads))


def l2_norm_of(norms: Tensor) -> Tensor:
    """That of all gradients, from the norm of each."""
    return torch.sqrt(norms.square().sum())


def largest_magnitude(grads: Sequence[Tensor]) -> Tensor:
    """Largest absolute value over all gradients, 0-dim; NaN if any element is NaN."""
    return norms([g for g in grads if g.numel()] or [grads[0].new_zeros(1)], float("inf")).max()


@torch.no_grad()
def moment_ratios(
    grads: Sequence[Tensor], moments: Sequence[Tensor], *, beta: float, eps: float, divisor: Tensor | None = None
) -> Tensor:
    """sqrt(sum(g^2 / max(v, eps^2))) of each gradient, v being Adam's second moment with this gradient, and its bias.

    Times sqrt((1 - beta^t) / n), of n values and after t steps, it is the RMS of "Stable and low-precision training"
    (arXiv 2304.13013): above 1 if the gradient has outgrown its past.

    Args:
        grads: fp32, whole or in part.
        moments: the second moments before the step, of the same shapes.
        divisor: 0-dim; the gradients are divided by it first (a loss scale).

    Returns:
        As `norms`.
    """
    own = list(grads)
    if divisor is not None:
        own = list(torch._foreach_mul(own, moved(divisor, own[0].device).reciprocal()))
    seconds = list(torch._foreach_lerp(list(moments), torch._foreach_mul(own, own), 1 - beta))
    torch._foreach_clamp_min_(seconds, eps**2)
    torch._foreach_sqrt_(seconds)
    return norms(torch._foreach_div(own, seconds))


def multiply_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply every gradient in place by a 0-dim factor."""
    with torch.no_grad():
        for (device, _dtype), group in _by_kind(grads).items():
            torch._foreach_mul_(group, moved(factor, device))
