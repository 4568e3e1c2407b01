"""Injects faults into a model's training at chosen steps: bad numbers and exceptions.

    faults = FaultInjector(model, optimizer)
    faults.add(Fault(kind="nan", where="activation", module="fc1", steps={3}))
    with faults:
        for faults.step, batch in enumerate(batches):
            trainer.step(batch)

The injector does not count steps itself: the loop says which one it is in (`step`), so a forward that
is repeated for the same step meets the same fault.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Kind = Literal["nan", "inf", "huge", "tiny", "raise"]
Where = Literal["input", "activation", "gradient", "buffer", "optimizer"]

VALUES: dict[str, float] = {"nan": float("nan"), "inf": float("inf"), "huge": 1e30, "tiny": 1e-30}


class InjectedError(RuntimeError):
    """Raised by a fault of kind 'raise'."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault: what, where, and at which steps.

    `where`: the module's first input, its output ('activation'), the gradient of its output
    ('gradient'), its floating buffers ('buffer'), or just before the optimizer steps ('optimizer',
    only with kind 'raise').
    """

    kind: Kind
    where: Where
    module: str = ""
    steps: frozenset[int] | set[int] | range = frozenset({0})


class FaultInjector:
    """Holds faults and, inside its context, the hooks that inject them."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        self.step = 0
        self._model, self._optimizer = model, optimizer
        self._faults: list[Fault] = []
        self._handles: list[RemovableHandle] = []

    def add(self, fault: Fault) -> FaultInjector:
        """Add a fault; returns the injector, so that calls chain."""
        self._faults.append(fault)
        return self

    def over(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches, counting `step` along."""
        for batch in loader:
            yield batch
            self.step += 1

    def __enter__(self) -> FaultInjector:
        for fault in self._faults:
            self._handles.append(self._hook(fault))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, fault: Fault) -> RemovableHandle:
        if fault.where == "optimizer":
            assert self._optimizer is not None, "pass the optimizer to inject into it"
            return self._optimizer.register_step_pre_hook(lambda *_: self._raise_if_due(fault))
        module = self._model.get_submodule(fault.module)
        if fault.where == "input":
            return module.register_forward_pre_hook(self._input(fault))
        if fault.where == "buffer":
            return module.register_forward_hook(self._buffers(fault))
        return module.register_forward_hook(self._output(fault))

    def _due(self, fault: Fault) -> bool:
        return self.step in fault.steps

    def _raise_if_due(self, fault: Fault) -> None:
        if self._due(fault):
            raise InjectedError(f"{fault.where} of {fault.module or 'the model'} at step {self.step}")

    def _input(self, fault: Fault) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> Any:
            if not self._due(fault):
                return None
            return (self._spoil(fault, args[0]), *args[1:])

        return hook

    def _output(self, fault: Fault) -> Callable[..., Any]:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Any:
            if not self._due(fault):
                return None
            if fault.where == "activation":
                return self._spoil(fault, output)
            if output.requires_grad:
                output.register_hook(lambda grad: self._spoil(fault, grad))
            return None

        return hook

    def _buffers(self, fault: Fault) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            if self._due(fault):
                for buffer in module.buffers():
                    if buffer.is_floating_point():
                        buffer.view(-1)[0] = VALUES[fault.kind]

        return hook

    def _spoil(self, fault: Fault, tensor: Tensor) -> Tensor:
        """The tensor with its first element replaced (or an exception in its place)."""
        if fault.kind == "raise":
            self._raise_if_due(fault)
        if not tensor.numel() or not tensor.is_floating_point():
            return tensor
        first = torch.zeros_like(tensor, dtype=torch.bool)
        first.view(-1)[0] = True
        return tensor.masked_fill(first, VALUES[fault.kind])
