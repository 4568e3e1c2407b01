"""The contenders of `offload.py`: a decoder, and the ways to keep masters and moments of its weights.

`Training` is a model with its batch. An arm makes an optimizer for it: on the device, offloaded by this package, or by
torchao's `CPUOffloadOptimizer`, which is optional.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from decoder import Decoder, DecoderConfig, next_token_loss
from torch import Tensor, nn

from deepseek_mp.optim.offload import HostMemory, OffloadedOptimizer, OffloadSettings, Rates

SIZES = DecoderConfig(width=2048, heads=16, hidden=5632, layers=24)
"""1.36 billion weights."""
SMALL = DecoderConfig(width=64, heads=4, hidden=128, layers=2, vocabulary=256)
BATCH, LENGTH = 16, 1024
RATE = 1e-4
BYTES_PER_VALUE = 14
"""That a value of a BF16 model frees on the device: its FP32 master, two moments, and its gradient in BF16."""

FP32_BYTES_PER_VALUE = 12
"""Of an FP32 model: two moments and its gradient; the weights stay."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """How one case trains."""

    kind: str = "offloaded"
    """'device': masters, moments and FP32 gradients on it; 'offloaded': ours; 'torchao'."""
    micro: int = 1
    """Micro-batches of a step."""
    mode: str = "sync"
    share: float = 1.0
    """Of the values that are offloaded."""
    undo: bool = True
    begin: str = "step"
    """Of mode 'immediate'."""
    fp32: bool = False
    """FP32 weights under BF16 autocast, instead of BF16 weights."""
    offload_gradients: bool = False
    """torchao's option: frees gradients early, and cannot accumulate."""


ARMS = {
    "device": Arm(kind="device"),
    "sync": Arm(),
    "device-4": Arm(kind="device", micro=4),
    "sync-4": Arm(micro=4),
    "delayed-4": Arm(micro=4, mode="delayed"),
    "speculative": Arm(mode="speculative"),
    "torchao": Arm(kind="torchao"),
    "torchao-gradients": Arm(kind="torchao", offload_gradients=True),
    "torchao-4": Arm(kind="torchao", micro=4),
    "delayed": Arm(mode="delayed"),
    "speculative-4": Arm(micro=4, mode="speculative"),
    "sync-without-undo": Arm(undo=False),
    "sync-25": Arm(share=0.25),
    "sync-50": Arm(share=0.5),
    "sync-75": Arm(share=0.75),
    "speculative-65": Arm(mode="speculative", share=0.65),
    "speculative-4-65": Arm(micro=4, mode="speculative", share=0.65),
    "fp32-speculative-65": Arm(fp32=True, mode="speculative", share=0.65),
    "immediate": Arm(mode="immediate", undo=False),
    "immediate-65": Arm(mode="immediate", undo=False, share=0.65),
    "immediate-70": Arm(mode="immediate", undo=False, share=0.7),
    "immediate-60": Arm(mode="immediate", undo=False, share=0.605),
    "immediate-4-60": Arm(micro=4, mode="immediate", undo=False, share=0.605),
    "immediate-4": Arm(micro=4, mode="immediate", undo=False),
    "immediate-4-65": Arm(micro=4, mode="immediate", undo=False, share=0.65),
    "fp32-immediate": Arm(fp32=True, mode="immediate", undo=False),
    "fp32-immediate-65": Arm(fp32=True, mode="immediate", undo=False, share=0.65),
    "backward": Arm(mode="immediate", begin="backward", undo=False),
    "backward-70": Arm(mode="immediate", begin="backward", undo=False, share=0.7),
    "backward-65": Arm(mode="immediate", begin="backward", undo=False, share=0.65),
    "backward-60": Arm(mode="immediate", begin="backward", undo=False, share=0.605),
    "backward-4": Arm(micro=4, mode="immediate", begin="backward", undo=False),
    "backward-4-65": Arm(micro=4, mode="immediate", begin="backward", undo=False, share=0.65),
    "backward-4-60": Arm(micro=4, mode="immediate", begin="backward", undo=False, share=0.605),
    "fp32-backward": Arm(fp32=True, mode="immediate", begin="backward", undo=False),
    "fp32-backward-65": Arm(fp32=True, mode="immediate", begin="backward", undo=False, share=0.65),
    "fp32-sync": Arm(fp32=True),
    "fp32-speculative": Arm(fp32=True, mode="speculative"),
    "fp32-sync-without-undo": Arm(fp32=True, undo=False),
    "fp32-torchao": Arm(kind="torchao", fp32=True, offload_gradients=True),
}


class Steps(Protocol):
    """What an arm needs of an optimizer."""

    def step(self) -> Any:
        """Update the weights; gradients are gone afterwards."""

    def close(self) -> None:
        """Leave the model free for another one."""


class Training:
    """A model and its batch."""

    def __init__(self, device: torch.device, *, small: bool, fp32: bool = False) -> None:
        config = SMALL if small else SIZES
        torch.manual_seed(0)
        with torch.device(device):
            model = Decoder(config)
        self.model, self.device = (model if fp32 else model.to(torch.bfloat16)), device
        shape = (2, 33) if small else (BATCH, LENGTH + 1)
        tokens = torch.randint(0, config.vocabulary, shape, device=device)
        self.inputs, self.targets = tokens[:, :-1], tokens[:, 1:]
        self.values = sum(p.numel() for p in self.model.parameters())
        self._region = (lambda: torch.autocast(device.type, torch.bfloat16)) if fp32 else nullcontext

    def backward(self, micro: int) -> Tensor:
        """Forward and backward of a window; the last micro-batch's loss."""
        for _ in range(micro):
            with self._region():
                loss = next_token_loss(self.model(self.inputs), self.targets)
            (loss / micro).backward()
        return loss.detach()

    def without_optimizer(self, micro: int) -> Tensor:
        loss = self.backward(micro)
        self.model.zero_grad()
        return loss


class OnDevice:
    """PyTorch's fused AdamW over FP32 masters on the device; gradients of a window are added up in FP32."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters: list[Tensor] = list(model.parameters())
        self._masters: list[Tensor] = [nn.Parameter(p.detach().float()) for p in self._parameters]
        self._of = dict(zip(self._parameters, self._masters, strict=True))
        fused = self._parameters[0].device.type in ("cpu", "cuda")
        self._adamw = torch.optim.AdamW(self._masters, lr=RATE, fused=fused)
        self._handles = [p.register_post_accumulate_grad_hook(self._arrived) for p in self._parameters]

    def _arrived(self, parameter: Tensor) -> None:
        master, gradient = self._of[parameter], parameter.grad
        parameter.grad = None
        assert gradient is not None
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad.add_(gradient)

    @torch.no_grad()
    def step(self) -> None:
        self._adamw.step()
        self._adamw.zero_grad()
        torch._foreach_copy_(self._parameters, self._masters)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


class Torchao:
    """torchao's optimizer, as its documentation uses it: AdamW, fused on the host."""

    def __init__(self, training: Training, arm: Arm) -> None:
        from torchao.optim import CPUOffloadOptimizer

        parameters = training.model.parameters()
        self._own = CPUOffloadOptimizer(
            parameters, torch.optim.AdamW, offload_gradients=arm.offload_gradients, fused=True, lr=RATE
        )

    def step(self) -> None:
        self._own.step()
        self._own.zero_grad()

    def close(self) -> None:
        """Its hooks stay with the model, which is not used again."""


def why_not(arm: Arm, device: torch.device) -> str | None:
    """Why an arm cannot run here; None if it can."""
    if arm.kind != "torchao":
        return None
    if device.type != "cuda":
        return "torchao offloads from CUDA devices only"
    try:
        import torchao.optim  # noqa: F401
    except ImportError as error:
        return f"torchao is missing: {error}"
    return None


def optimizer_of(training: Training, arm: Arm, memory: HostMemory, rates: Rates | None = None) -> Steps:
    """The arm's optimizer for this model; `rates` decide which side rounds weights."""
    makers: dict[str, Callable[[], Steps]] = {
        "device": lambda: OnDevice(training.model),
        "torchao": lambda: Torchao(training, arm),
        "offloaded": lambda: _offloaded(training, arm, memory, rates),
    }
    return makers[arm.kind]()


def _offloaded(training: Training, arm: Arm, memory: HostMemory, rates: Rates | None) -> OffloadedOptimizer:
    settings, rate = settings_of(training, arm, rates)
    parameters = training.model.parameters()
    return OffloadedOptimizer(parameters, lr=rate, model=training.model, settings=settings, memory=memory)


def settings_of(training: Training, arm: Arm, rates: Rates | None = None) -> tuple[OffloadSettings, float]:
    """Of an arm of ours, and its learning rate."""
    per_value = FP32_BYTES_PER_VALUE if arm.fp32 else BYTES_PER_VALUE
    free = None if arm.share == 1.0 else int(arm.share * training.values) * per_value
    settings = OffloadSettings(
        mode=arm.mode,
        begin=arm.begin,
        undo=arm.undo,
        free_bytes=free,
        delay_from=0,
        rates=rates,
        accumulation=arm.micro,
        check_finite=arm.mode != "immediate",
    )
    return settings, RATE
