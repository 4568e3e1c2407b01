"""Injects faults into a model's training at chosen steps: bad numbers and exceptions.

    faults = FaultInjector(model, optimizer)
    faults.add(Fault(kind="nan", where="activation", module="fc1", steps={3}))
    with faults:
        for faults.step, batch in enumerate(batches):
            trainer.step(batch)

The injector does not count steps itself: the loop says which one it is in (`step`), so a forward that
is repeated for the same step meets the same fault. A fault that finds nothing to spoil raises
`InjectedError`: a test with a fault that never happened would prove nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.nn.nested import map_leaves

Kind = Literal["nan", "inf", "huge", "tiny", "raise"]
Where = Literal["input", "activation", "gradient", "buffer", "loss", "optimizer"]

VALUES: dict[str, float] = {"nan": float("nan"), "inf": float("inf"), "huge": 1e30, "tiny": 1e-30}


class InjectedError(RuntimeError):
    """Raised by a fault of kind 'raise', and by one that finds nothing to spoil."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault: what, where, and at which steps.

    `where`: the module's floating inputs, its outputs ('activation'), the gradients of its outputs
    ('gradient'), its floating buffers after its forward ('buffer'), the loss of a function wrapped by
    `FaultInjector.loss`, or just before the optimizer steps ('optimizer', only with kind 'raise').
    Of each tensor the first element becomes the bad value.

    Raises:
        ConfigError: a kind or a place that does not exist, or do not go together.
    """

    kind: Kind
    where: Where
    module: str = ""
    steps: frozenset[int] | set[int] | range = frozenset({0})

    def __post_init__(self) -> None:
        for name, allowed in (("kind", get_args(Kind)), ("where", get_args(Where))):
            if getattr(self, name) not in allowed:
                passed = f"Fault({name}={getattr(self, name)!r})"
                raise ConfigError(explain(passed, ", ".join(map(repr, allowed)), f"Change {name}"))
        if self.where == "optimizer" and self.kind != "raise":
            passed = f"Fault(kind={self.kind!r}, where='optimizer')"
            raise ConfigError(explain(passed, "kind='raise' there", "Spoil a gradient instead"))


class FaultInjector:
    """Holds faults and, inside its context, the hooks that inject them."""

    def __init__(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        self.step = 0
        self._model, self._optimizer = model, optimizer
        self._faults: list[Fault] = []
        self._hooks = ExitStack()
        self._active = False

    def add(self, fault: Fault) -> FaultInjector:
        """Add a fault, before the context is entered; returns the injector, so that calls chain."""
        self._faults.append(fault)
        return self

    def over(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches, counting `step` along."""
        for batch in loader:
            yield batch
            self.step += 1

    def loss(self, loss_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`loss_fn` with the faults of `where='loss'`."""

        def spoiled(*args: Any, **kwargs: Any) -> Tensor:
            value = loss_fn(*args, **kwargs)
            for fault in self._faults:
                if fault.where == "loss" and self._active and self._due(fault):
                    value = self._spoil(fault, value)
            return value

        return spoiled

    def __enter__(self) -> FaultInjector:
        with self._hooks:
            for fault in self._faults:
                if fault.where != "loss":
                    self._hooks.callback(self._hook(fault).remove)
            self._hooks = self._hooks.pop_all()  # in place until the context ends, unless a fault has no place
        self._active = True
        return self

    def __exit__(self, *_: object) -> None:
        self._active = False
        self._hooks.close()

    def _hook(self, fault: Fault) -> RemovableHandle:
        if fault.where == "optimizer":
            assert self._optimizer is not None, "pass the optimizer to inject into it"
            return self._optimizer.register_step_pre_hook(lambda *_: self._raise_if_due(fault))
        module = self._model.get_submodule(fault.module)
        if fault.where == "input":
            return module.register_forward_pre_hook(self._input(fault), with_kwargs=True)
        if fault.where == "buffer":
            return module.register_forward_hook(self._buffers(fault))
        return module.register_forward_hook(self._output(fault))

    def _due(self, fault: Fault) -> bool:
        return self.step in fault.steps

    def _raise_if_due(self, fault: Fault) -> None:
        if self._due(fault):
            raise InjectedError(f"{fault.where} of {fault.module or 'the model'} at step {self.step}")

    def _input(self, fault: Fault) -> Callable[..., Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._spoil(fault, (args, kwargs)) if self._due(fault) else None

        return hook

    def _output(self, fault: Fault) -> Callable[..., Any]:
        def leaving(output: Tensor) -> Tensor:
            output.register_hook(lambda grad: self._spoil(fault, grad))
            return output

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            if not self._due(fault):
                return None
            if fault.where == "activation":
                return self._spoil(fault, output)
            if torch.is_grad_enabled():
                self._each(fault, output, leaving, lambda tensor: tensor.requires_grad)
            return None

        return hook

    def _buffers(self, fault: Fault) -> Callable[..., None]:
        def hook(module: nn.Module, *_: Any) -> None:
            if self._due(fault):
                for buffer, bad in zip(module.buffers(), self._spoil(fault, list(module.buffers())), strict=True):
                    buffer.data.copy_(bad)  # not seen by autograd, as BatchNorm's own updates are not

        return hook

    def _spoil(self, fault: Fault, tree: Any) -> Any:
        """The tensors with their first element replaced (or an exception in their place)."""
        if fault.kind == "raise":
            self._raise_if_due(fault)

        def bad(tensor: Tensor) -> Tensor:
            first = torch.zeros_like(tensor, dtype=torch.bool)
            first.view(-1)[:1] = True
            return tensor.masked_fill(first, VALUES[fault.kind])

        return self._each(fault, tree, bad, torch.is_floating_point)

    def _each(
        self, fault: Fault, tree: Any, change: Callable[[Tensor], Tensor], which: Callable[[Tensor], bool]
    ) -> Any:
        """The tree with its tensors changed that fit; `InjectedError` if none does."""
        found = []

        def changed(leaf: Any) -> Any:
            if not (isinstance(leaf, Tensor) and which(leaf)):
                return leaf
            found.append(leaf)
            return change(leaf)

        result = map_leaves(tree, changed)
        if not found:
            raise InjectedError(f"nothing to spoil: no tensor in the {fault.where} of {fault.module or 'the model'}")
        return result
