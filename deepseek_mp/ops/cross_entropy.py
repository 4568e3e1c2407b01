"""Cross entropy of some rows of logits and its gradient at once, in one kernel where the device has one.

Formulas, for a row with logits z, label y and smoothing e, of V classes: loss = log sum exp z - (1-e) z[y] - e mean(z),
and its gradient is softmax(z) - (1-e) onehot(y) - e/V.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from deepseek_mp.ops.choose import cross_entropy_of, kernel_runs

NARROW = (torch.float32, torch.bfloat16, torch.float16)


def cross_entropy_rows(
    logits: Tensor, labels: Tensor, *, smoothing: float = 0.0, factors: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Losses [R], fp32 (fp64 of fp64), and the gradient of sum(factors * losses) [R, V] in the logits' dtype.

    Args:
        logits: [R, V], floating, each row contiguous. Written over: the gradient may be in their memory.
        labels: [R], int64, from 0 to V-1.
        smoothing: weight of the uniform distribution in the target, from 0 to 1.
        factors: [R], of the losses' dtype; None: there is no gradient.
    """
    kernel = logits.dtype in NARROW and logits.stride(-1) == 1 and _kernel_runs(logits.device)
    return cross_entropy_of("triton" if kernel else "reference")(logits, labels, smoothing, factors)


@cache
def _kernel_runs(device: torch.device) -> bool:
    def once() -> None:
        labels = torch.zeros(1, dtype=torch.int64, device=device)
        cross_entropy_of("triton")(torch.ones(1, 1, device=device), labels, 0.0, None)

    return kernel_runs(device, "the cross entropy in chunks", once)
