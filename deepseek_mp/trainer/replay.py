"""Names the first module that turns finite numbers into non-finite ones, by running a step again.

Looking for it in every step would slow every step down. A failed step is rare, so its micro-batches
are kept until its outcome is known, and run again with the same random state, eagerly and with hooks
on every module. A module is the *producer* if what goes into it is finite and what comes out is not,
in forward or in backward; modules that merely pass a NaN on are not named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.trainer.window import MicroBatch

LOSS = "(loss function)"
"""The name given when all modules are finite and the loss, or its gradient, is not."""


def get_rng(device: torch.device) -> list[Tensor]:
    """States of PyTorch's generators that forward may draw from: the CPU's and the device's."""
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state())
    return states


def set_rng(states: list[Tensor], device: torch.device) -> None:
    """Put back what `get_rng` returned."""
    torch.set_rng_state(states[0])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1])


def find_first_bad_module(
    model: nn.Module, entries: Iterable[MicroBatch], compute: Callable[[MicroBatch], Tensor], device: torch.device
) -> str | None:
    """Replay micro-batches until one goes bad; gradients and random state end as they began.

    Args:
        compute: runs forward and backward of a micro-batch with `model`, returns its loss.

    Returns:
        The module's name, `LOSS`, or None if everything was finite this time (a sum over the window
        overflowed, or the hardware erred).
    """
    kept = [(p, p.grad) for p in model.parameters()]
    rng = get_rng(device)
    try:
        for entry in entries:
            set_rng(entry.rng, device)
            for param, _ in kept:
                param.grad = None
            watch = _Watch(model)
            with watch.hooks(), torch.compiler.set_stance("force_eager"):
                loss = compute(entry)
            if watch.first is not None or not bool(torch.isfinite(loss).all()):
                return watch.first or watch.passed_on or LOSS
            if watch.loss_gradient_bad:
                return LOSS
    finally:
        set_rng(rng, device)
        for param, grad in kept:
            param.grad = grad
    return None


def _tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from _tensors(list(tree.values()))
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from _tensors(item)


def _bad(tensors: Iterable[Tensor]) -> bool:
    return any(t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in tensors)


class _Watch:
    """Hooks that remember the first producer of a non-finite value."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.first: str | None = None
        self.passed_on: str | None = None
        """The first module with a non-finite output though its input was non-finite already (a mask of -inf)."""
        self.loss_gradient_bad = False

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Watch every call of every module inside this context."""
        handles = [
            module.register_forward_hook(self._forward_hook(name), with_kwargs=True)
            for name, module in self._model.named_modules()
        ]
        handles += [
            param.register_post_accumulate_grad_hook(self._parameter_hook(name))
            for name, param in self._model.named_parameters()
            if param.requires_grad
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _name(self, producer: str) -> None:
        if self.first is None:
            self.first = producer

    def _forward_hook(self, name: str) -> Callable[..., None]:
        def check(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(output))
            if _bad(outputs):
                if not _bad(inputs) or _bad(module.parameters(recurse=False)):
                    self._name(name or type(module).__name__)
                elif self.passed_on is None:
                    self.passed_on = name or type(module).__name__
            self._watch_backward(name, inputs, outputs)

        return check

    def _watch_backward(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Inner modules finish first, so that their hooks on a shared tensor fire before the outer ones'."""
        arrived: list[bool] = []

        def leaving(grad: Tensor) -> None:
            arrived.append(_bad([grad]))
            if arrived[-1] and name == "":
                self.loss_gradient_bad = True

        def entering(grad: Tensor) -> None:
            if _bad([grad]) and arrived and not any(arrived):
                self._name(name)

        made = {id(t) for t in outputs}
        for tensor in outputs:
            if tensor.requires_grad:
                tensor.register_hook(leaving)
        for tensor in inputs:
            if tensor.requires_grad and id(tensor) not in made:
                tensor.register_hook(entering)

    def _parameter_hook(self, name: str) -> Callable[[Tensor], None]:
        owner = name.rpartition(".")[0] or name

        def check(param: Tensor) -> None:
            if param.grad is not None and not self.loss_gradient_bad and _bad([param.grad]):
                self._name(owner)

        return check
