"""The norm of a step's gradients: of blocks as they land, or of whole tensors where PyTorch's bits count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from deepseek_mp.optim.offload.crew import Crew

SAMPLES = 64
"""Values of a gradient that are looked at again: some write without PyTorch counting it, as `GradScaler.unscale_`."""


@dataclass(frozen=True)
class Landed:
    """A gradient as it landed."""

    norms: Sequence[Tensor]
    """Of its blocks, [] each."""
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


def total_norm(grads: Sequence[Tensor], crew: Crew) -> Tensor:
    """`torch.nn.utils.get_total_norm` to the bit. It takes one core for all tensors; here each thread takes some."""
    if crew.threads == 1 or any(grad.device.type != "cpu" or grad.dtype is not torch.float32 for grad in grads):
        return get_total_norm(grads)
    found = [torch.empty(())] * len(grads)

    def take(place: int) -> None:
        found[place] = torch.linalg.vector_norm(grads[place], 2.0)

    crew.run([partial(take, place) for place in range(len(grads))])
    norm: Tensor = torch.linalg.vector_norm(torch.stack(found), 2.0)
    return norm
