"""The norm of a step's gradients: of blocks as they land, or of whole tensors where PyTorch's bits count."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

SAMPLES = 64
"""Values of a gradient that are looked at again: some write without PyTorch counting it, as `GradScaler.unscale_`."""
LEAST = 1 << 16
"""Values from which on several threads take a norm."""


@dataclass(frozen=True)
class Landed:
    """A gradient as it landed."""

    norms: Sequence[Tensor]
    """Of its blocks, [n] each."""
    gradient: Tensor
    version: int
    sample: Tensor

    @staticmethod
    def of(gradient: Tensor, norms: Sequence[Tensor]) -> Landed:
        return Landed(norms, gradient, gradient._version, sample(gradient))

    def still(self, gradient: Tensor) -> bool:
        """Whether this is the gradient, as it was."""
        same = gradient is self.gradient and gradient._version == self.version
        return same and torch.equal(sample(gradient), self.sample)


def sample(gradient: Tensor) -> Tensor:
    """Some values of a gradient, by which a change shows that nobody has counted."""
    flat = gradient.reshape(-1)
    return flat[:: -(-flat.numel() // SAMPLES) or 1].clone()


def norms_of(values: Tensor, threads: int) -> Tensor:
    """[n]: L2 norms of parts of a flat tensor. PyTorch takes one core for the norm of a part, and one for each part."""
    if threads == 1 or values.numel() < LEAST:
        norm: Tensor = torch.linalg.vector_norm(values).view(1)
        return norm
    length, more = divmod(values.numel(), threads)
    if not more:
        rows: Tensor = torch.linalg.vector_norm(values.view(threads, length), dim=1)
        return rows
    even = torch.linalg.vector_norm(values[: length * threads].view(threads, length), dim=1)
    return torch.cat([even, torch.linalg.vector_norm(values[length * threads :]).view(1)])


def total_norm(grads: Sequence[Tensor], threads: int) -> Tensor:
    """`torch.nn.utils.get_total_norm` to the bit. It takes one core for all tensors; here each thread takes some."""
    if threads == 1 or any(grad.device.type != "cpu" or grad.dtype is not torch.float32 for grad in grads):
        return get_total_norm(grads)
    with ThreadPoolExecutor(min(threads, len(grads))) as pool:
        found = list(pool.map(_norm, grads))
    norm: Tensor = torch.linalg.vector_norm(torch.stack(found), 2.0)
    return norm


@torch.no_grad()
def _norm(grad: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(grad, 2.0)
    return norm
