"""Names the first module that turns finite numbers into non-finite ones, by running a step again.

Looking for it in every step would slow every step down. A failed step is rare, so its micro-batches
are kept until its outcome is known, and run again with the same random state, eagerly and with hooks
on every module. A module is the *producer* if what goes into it is finite and what comes out is not,
in forward or in backward; modules that merely pass a NaN on are not named.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deepseek_mp.costs.timing import is_out_of_memory
from deepseek_mp.nn.again import is_computed_again
from deepseek_mp.nn.nested import numbers, tensors
from deepseek_mp.ops.non_finite import non_finite
from deepseek_mp.trainer.failed_step import let_go
from deepseek_mp.trainer.rng import rng_state, set_rng, set_rng_state
from deepseek_mp.trainer.window import MicroBatch

log = logging.getLogger("deepseek_mp")

LOSS = "(loss function)"
"""The name given when all modules are finite and the loss, or its gradient, is not."""
BATCH = "(batch)"
"""The name given when no module is to blame and the batch itself has a NaN in it."""


def find_first_bad_module(
    model: nn.Module,
    entries: Iterable[MicroBatch],
    compute: Callable[[MicroBatch], Tensor],
    device: torch.device,
    *,
    others: Iterable[Tensor] = (),
) -> str | None:
    """Replay micro-batches until one goes bad; gradients and random state end as they began.

    Args:
        compute: runs forward and backward of a micro-batch with `model`, returns its loss.
        others: parameters outside the model whose gradients are to be kept too (a loss may have some).

    Returns:
        The module's name, `BATCH`, `LOSS`, or None if everything was finite this time (a sum over the
        window overflowed, or the hardware erred), or if memory ran out: a replay holds scores that a step with a
        fused loss does without, and activations as they are.
    """
    kept = [(p, p.grad) for p in (*model.parameters(), *others)]
    everything = rng_state(device)  # Python's and NumPy's too: a forward may draw from any of them
    try:
        for entry in entries:
            set_rng(entry.rng, device)
            for param, _ in kept:
                param.grad = None
            watch = _Watch(model)
            with watch.hooks(), torch.compiler.set_stance("force_eager"):
                loss = compute(entry)
            culprit = watch.culprit(entry.batch, loss)
            if culprit is not None:
                return culprit
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        let_go(error, device)
        log.warning("memory ran out when a skipped step was run again, so that no module is named")
    finally:
        set_rng_state(*everything, device)
        for param, grad in kept:
            param.grad = grad
    return None


@torch.no_grad()  # what a look saved would be missing in a block that is computed again
def _bad(tree: Any) -> bool:
    return any(_is_bad(part) for part in numbers(tree))


def _is_bad(part: Tensor) -> bool:
    if type(part) in (Tensor, nn.Parameter):  # in little memory, and of numbers in 8 bits too
        return bool(non_finite(part))
    return not bool(torch.isfinite(part).all())


@torch.no_grad()
def _has_nan(tree: Any) -> bool:
    return any(bool(torch.isnan(part.float() if part.itemsize == 1 else part).any()) for part in numbers(tree))


class _Watch:
    """Hooks that remember where non-finite values came from in one forward and backward.

    Infinities can be meant: masks are made of them. So a producer counts only if the loss, or the
    gradient of a parameter, was bad in the end, and where the loss is finite the backward decides.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._forward: str | None = None
        """The first module to make a bad output of good inputs."""
        self._passed_on: str | None = None
        """The first module with a bad output whose input was bad already."""
        self._backward: str | None = None
        """The first module to make a bad gradient of good ones."""
        self._bad_gradient: str | None = None
        """The first module with a bad gradient of a parameter."""
        self._arrived: dict[str, list[bool]] = defaultdict(list)
        """Per module, whether the gradients of its outputs were bad."""
        self._output_bad = self._loss_gradient_bad = False

    def culprit(self, batch: Any, loss: Tensor) -> str | None:
        """What to blame, None if loss and gradients are finite."""
        if _bad(loss):
            return self._forward or (BATCH if _has_nan(batch) else self._passed_on) or LOSS
        if self._loss_gradient_bad:
            return (self._forward if self._output_bad else None) or LOSS
        return self._bad_gradient and (self._backward or self._bad_gradient)

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

    def _forward_hook(self, name: str) -> Callable[..., None]:
        def check(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if is_computed_again():
                return
            inputs, outputs = list(tensors((args, kwargs))), list(tensors(output))
            if _bad(outputs):
                shown = name or type(module).__name__
                self._output_bad = self._output_bad or name == ""
                if not _bad(inputs) or _bad(list(module.parameters(recurse=False))):
                    self._forward = self._forward or shown
                self._passed_on = self._passed_on or shown
            self._watch_backward(name, inputs, outputs)

        return check

    def _watch_backward(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """Inner modules finish first, so that their hooks on a shared tensor fire before the outer ones'."""
        arrived: list[bool] = []

        def leaving(grad: Tensor) -> None:
            arrived.append(_bad(grad))
            self._arrived[name].append(arrived[-1])
            if arrived[-1] and name == "":
                self._loss_gradient_bad = True

        def entering(grad: Tensor) -> None:
            if _bad(grad) and arrived and not any(arrived):
                self._backward = self._backward or name or type(self._model).__name__

        made = {id(t) for t in outputs}
        for tensor in outputs:
            if tensor.requires_grad:
                tensor.register_hook(leaving)
        for tensor in inputs:
            if tensor.requires_grad and id(tensor) not in made:
                tensor.register_hook(entering)

    def _parameter_hook(self, name: str) -> Callable[[Tensor], None]:
        owner = name.rpartition(".")[0]
        shown = owner or type(self._model).__name__

        def check(param: Tensor) -> None:
            if _bad(param.grad):
                self._bad_gradient = self._bad_gradient or shown
                if not any(self._arrived[owner]):
                    self._backward = self._backward or shown

        return check
