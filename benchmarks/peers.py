"""What users write without this package: a training loop with autocast and, for fp16, GradScaler.

For FP8 they convert the model with torchao, which is optional here: only `Mode(float8=...)` needs it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from cases import Case, OptimizerFactory
from torch import Tensor, nn
from torch.optim import Optimizer

from deepseek_mp.backends import math_mode, synchronize
from deepseek_mp.trainer.compile import repeated_blocks

SAFE_SCALE = 1024.0
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
FLOAT8_MULTIPLE = 16
"""Sizes of a layer must be multiples of this for an FP8 product."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One of PyTorch's own ways to train."""

    format: str
    channels_last: bool = False
    compile: bool | Literal["regional"] = False
    """'regional' compiles the model's repeated blocks, each kind once."""
    compile_loss: bool = False
    """Compile the loss function too, as one of its own."""
    float8: str = ""
    """torchao's recipe for the linear layers (tensorwise, rowwise, ...); the rest runs in `format`."""
    onednn: str = ""
    """oneDNN's arithmetic for fp32 products on a CPU, where not fp32 itself."""

    @property
    def name(self) -> str:
        parts = (
            self.format,
            "GradScaler" if self.format == "fp16" else "",
            "channels_last" if self.channels_last else "",
            self.float8 and f"torchao-{self.float8}",
            f"compile-{self.compile}" if self.compile == "regional" else "compile" if self.compile else "",
            "compiled-loss" if self.compile_loss else "",
            self.onednn and f"oneDNN-{self.onednn}",
        )
        return "+".join(part for part in parts if part)


class HandLoop:
    """A hand-written loop: one call of `step` is forward, backward and optimizer on the next batch."""

    def __init__(self, case: Case, mode: Mode, optimizer: OptimizerFactory, device: torch.device) -> None:
        self.mode, self.device = mode, device
        self.loss_fn = torch.compile(case.loss_fn) if mode.compile_loss and case.loss_fn else case.loss_fn
        self.model = case.model()
        if mode.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if mode.float8:
            to_float8(self.model, mode.float8)
        self.forward: Any = torch.compile(self.model) if mode.compile is True else self.model
        if mode.compile == "regional":
            for block in repeated_blocks(self.model):
                block.compile()
        self.optimizer = optimizer(self.model.parameters())
        # No skipped first step: PyTorch's fused SGD then leaves its momentum without a value (NaN, seen on an H200).
        self.scaler = torch.amp.GradScaler(device.type, init_scale=SAFE_SCALE) if mode.format == "fp16" else None
        self.batches: Iterator[Any] = itertools.cycle(case.batches)

    def step(self) -> Tensor:
        """Train on the next batch; returns the loss, still on the device."""
        loss = self.gradients()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss

    def gradients(self) -> Tensor:
        """Forward and backward of the next batch."""
        dtype = AUTOCAST.get(self.mode.format)
        with torch.autocast(self.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            loss = self._loss(next(self.batches))
        scaled = loss if self.scaler is None else self.scaler.scale(loss)
        scaled.backward()
        return loss.detach()

    def _loss(self, batch: Any) -> Tensor:
        if self.loss_fn is None:
            loss: Tensor = self.forward(**batch).loss
            return loss
        inputs, target = batch
        return self.loss_fn(self.forward(inputs), target)

    def flags(self) -> ExitStack:
        """The global settings a careful user makes once: cuDNN's search, and fp32 that is fp32."""
        stack = ExitStack()
        fp32 = "tf32" if self.mode.format != "fp32" and self.device.type != "cpu" else "ieee"
        stack.enter_context(math_mode(self.device, fp32=fp32, search=True))  # type: ignore[arg-type]
        if self.mode.onednn:
            matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
            stack.callback(setattr, matmul, "fp32_precision", matmul.fp32_precision)
            matmul.fp32_precision = self.mode.onednn
        return stack


def to_float8(model: nn.Module, recipe: str) -> None:
    """Convert the linear layers to torchao's, in place, but for the output layer and sizes it cannot multiply."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    output_layer = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1:]

    def wanted(module: nn.Module, name: str) -> bool:
        sizes = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else (1,)
        return name not in output_layer and all(size % FLOAT8_MULTIPLE == 0 for size in sizes)

    convert_to_float8_training(model, config=Float8LinearConfig.from_recipe_name(recipe), module_filter_fn=wanted)


def fastest_optimizer(case: Case, device: torch.device) -> tuple[str, OptimizerFactory]:
    """The optimizer whose step is the fastest for this model on this device."""
    if len(case.optimizers) == 1:
        return next(iter(case.optimizers.items()))
    model = case.model()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    times = {name: _time_step(factory(model.parameters()), device) for name, factory in case.optimizers.items()}
    best = min(times, key=times.__getitem__)
    return best, case.optimizers[best]


def _time_step(optimizer: Optimizer, device: torch.device) -> float:
    best = float("inf")
    for _ in range(4):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(5):
            optimizer.step()
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def resident_tensors(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """What outlives a step: parameters, buffers and the optimizer's state."""
    state = [v for per in optimizer.state.values() for v in per.values() if isinstance(v, Tensor)]
    return [*model.parameters(), *model.buffers(), *state]
