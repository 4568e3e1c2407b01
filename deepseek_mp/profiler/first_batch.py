"""The first batch of a profile and its loss: what tells a file of other data, another loss or other weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from deepseek_mp.costs.restore import Snapshot
from deepseek_mp.nn.call import Call
from deepseek_mp.nn.nested import tensors


def digest_of(call: Call) -> str:
    """A hash of the types, sizes and values of the batch's tensors."""
    found = hashlib.sha256()
    for tensor in tensors((call.args, call.kwargs, call.target)):
        found.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
        dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
        found.update(dense.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


@torch.enable_grad()
def seeded_loss(preserved: nn.Module, loss: Callable[[], Tensor], device: torch.device, seed: int) -> float:
    """The loss with what the model draws seeded; model and generators are afterwards as before.

    Gradients are on: a loss may take some itself. Waits for the device.
    """
    snapshot = Snapshot(preserved, device)
    try:
        torch.manual_seed(seed)
        return float(loss().detach())
    finally:
        snapshot.restore()
