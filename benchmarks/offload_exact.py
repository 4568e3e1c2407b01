"""Whether offloaded AdamW has the numbers of AdamW: on the same gradients, beside the host's and the device's own."""

from __future__ import annotations

from typing import Any

import torch
from decoder import DecoderConfig
from offload_arms import RATE
from torch import Tensor, nn

from deepseek_mp.optim.offload import OffloadedOptimizer, OffloadSettings

SIZES = DecoderConfig(width=512, heads=8, hidden=1408, layers=4, vocabulary=8000)
STEPS, MICRO = 10, 2
CLOSE = 1e-6
"""Allowed between the host's AdamW and the device's, relative to the norm of a parameter."""


class Reference:
    """AdamW over FP32 copies of a model's weights, all at once, on the gradients that the model's backward makes."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._of = {p: nn.Parameter(p.detach().to(device, torch.float32, copy=True)) for p in model.parameters()}
        fused = device.type in ("cpu", "cuda")
        self._adamw = torch.optim.AdamW(self.weights, lr=RATE, fused=fused)
        for parameter in self._of:
            parameter.register_post_accumulate_grad_hook(self._arrived)

    @property
    def weights(self) -> list[nn.Parameter]:
        return list(self._of.values())

    def _arrived(self, parameter: Tensor) -> None:
        """Before the offloaded optimizer takes the gradient: hooks run in the order in which they were made."""
        own, gradient = self._of[parameter], parameter.grad  # type: ignore[index]
        assert gradient is not None
        there = gradient.to(own.device)
        own.grad = there.clone() if own.grad is None else own.grad + there

    def step(self) -> None:
        self._adamw.step()
        self._adamw.zero_grad()


def compare(model: nn.Module, backward: Any, device: torch.device) -> dict[str, Any]:
    """Train an FP32 model offloaded, in mode 'sync', and both references on its gradients; `backward` makes them."""
    host, there = Reference(model, torch.device("cpu")), Reference(model, device)
    settings = OffloadSettings(chunk_bytes=1 << 20, accumulation=MICRO)
    optimizer = OffloadedOptimizer(model.parameters(), lr=RATE, model=model, settings=settings)
    for _ in range(STEPS):
        for _ in range(MICRO):
            backward()
        for each in (host, there, optimizer):
            each.step()
    optimizer.synchronize()
    weights = [p.detach().cpu() for p in model.parameters()]
    pairs = list(zip(weights, host.weights, strict=True))
    differing = sum(int((mine != other.detach()).sum()) for mine, other in pairs)
    relative = max(
        float((mine.double() - other.detach().cpu().double()).norm() / other.detach().double().norm())
        for mine, other in zip(weights, there.weights, strict=True)
    )
    problems = [f"{differing} weights differ from the host's AdamW"] if differing else []
    if not relative <= CLOSE:
        problems.append(f"{relative:.2g} from the device's AdamW")
    return {
        "steps": STEPS,
        "chunks": len(optimizer.split.host),
        "differing_from_host_adamw": differing,
        "relative_to_device_adamw": relative,
        "check": "; ".join(problems) or "passed",
    }
