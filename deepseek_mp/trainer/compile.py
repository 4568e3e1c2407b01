"""Compile a model and its loss whole, or the model's repeated blocks once each kind.

A deep model is mostly one block repeated. Compiling the block costs a fraction of compiling the model,
and the compiled code is shared by all its copies, since their parameters are inputs to it.

The loss is compiled too: apart from it, the logits of a language model are written in FP32 and several times
over, and as an output of compiled code they get a gradient of zeros that is added to the real one.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo  # so that its settings can be read before anything was compiled
from torch import nn
from torch._dynamo.utils import counters

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.nn import call as calls
from deepseek_mp.nn.convert import current_plan
from deepseek_mp.nn.loss import LossFn
from deepseek_mp.nn.own_code import with_own_code
from deepseek_mp.trainer.config import Compile
from deepseek_mp.trainer.graph_backend import Backend, backend

log = logging.getLogger("deepseek_mp")

LISTS = (nn.ModuleList, nn.Sequential)
RESTLESS = 4
"""Steps in a row that compile something under one plan; changing sizes seldom make more than two."""
PLANS = 64
"""Combinations of recipes that a compiled block may run in before it is left to eager code."""


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that stand two or more times, alike, in one list of the model (or that it is).

    A list is a ModuleList or a Sequential; a block is a child of one that has children of its own.
    Blocks are alike if they have one class; lists as blocks, if they hold the same modules.
    """
    kinds: dict[Any, list[nn.Module]] = defaultdict(list)
    if isinstance(model, LISTS):
        for block in model:
            if next(block.children(), None) is not None:
                kinds[repr(block) if isinstance(block, LISTS) else type(block)].append(block)
    found: list[nn.Module] = []
    for child in model.children():
        alike = next((blocks for blocks in kinds.values() if any(child is block for block in blocks)), [])
        found += [child] if len(alike) > 1 else repeated_blocks(child)
    return list(dict.fromkeys(found))


def check_compile(model: nn.Module, how: Compile) -> None:
    """`ConfigError` for 'regional' on a model without repeated blocks."""
    if how == "regional" and not repeated_blocks(model):
        raise ConfigError(
            explain(
                "compile='regional' on a model without repeated blocks",
                "two or more modules of one class in a ModuleList or Sequential",
                "Use compile=True",
            )
        )


Run = Callable[[calls.Call], calls.Result]
"""From a call to the loss."""


def compiled_run(model: nn.Module, loss_fn: LossFn | None, how: Compile, budget: float | None = None) -> Run:
    """`calls.run` of the model and the loss, compiled as asked. 'regional' compiles the blocks in place.

    Args:
        budget: for what the model keeps for its backward, as `graph_backend.backend` takes it.
    """
    if how is True:
        return _with_many_plans(_compiled_whole(model, loss_fn, backend(budget)))
    if how == "regional":
        for block in repeated_blocks(model):
            block.compile(backend=backend(budget))
        return _with_many_plans(_compiled_loss(model, loss_fn))
    return lambda call: calls.run(model, call, loss_fn)


def _compiled_whole(model: nn.Module, loss_fn: LossFn | None, backend: Backend) -> Run:
    def whole(args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> tuple[Any, str]:
        return calls.loss_of(model(*args, **kwargs), target, loss_fn)

    compiled, alone = torch.compile(with_own_code(whole), backend=backend), torch.compile(model, backend=backend)
    restless = Restless(model)

    def run(call: calls.Call) -> calls.Result:
        if restless.found:
            return calls.run(alone, call, loss_fn)
        with restless:
            return calls.result(call, compiled(call.args, calls.keywords(model, call), call.target), loss_fn)

    return run


class Restless:
    """Finds out, as a context around each call of compiled code, whether that is compiled anew again and again.

    A loss that counts its calls or keeps a list of losses is another function each time to the compiler. It then
    runs in eager code, beside the compiled model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.found = False
        self._model, self._plan = model, current_plan(model)
        self._in_a_row = self._before = 0

    def __enter__(self) -> None:
        self._before, plan = _graphs(), current_plan(self._model)
        if plan is not self._plan:
            self._plan, self._in_a_row = plan, -1  # another plan is compiled for once, with a reason

    def __exit__(self, *_: object) -> None:
        self._in_a_row = self._in_a_row + 1 if _graphs() > self._before else 0
        if self._in_a_row >= RESTLESS:
            self.found = True
            log.warning(
                "the model and its loss were compiled in each of %d steps: the loss runs uncompiled from now on. "
                "A loss that keeps something of its calls makes the compiler start again",
                RESTLESS,
            )


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def _compiled_loss(model: nn.Module, loss_fn: LossFn | None) -> Run:
    def loss(output: Any, target: Any) -> tuple[Any, str]:
        return calls.loss_of(output, target, loss_fn)

    compiled = torch.compile(with_own_code(loss), backend=backend(None))
    restless = Restless(model)

    def run(call: calls.Call) -> calls.Result:
        output = calls.invoke(model, call)
        if restless.found or (loss_fn is None and calls.own_loss(output) is not None):
            return calls.result(call, loss(output, call.target), loss_fn)
        with restless:
            return calls.result(call, compiled(output, call.target), loss_fn)

    return run


@contextmanager
def many_plans() -> Iterator[None]:
    """Inside there is room for compiled code of many plans.

    A block gets compiled code for every combination of its layers' recipes that it has run in, with gradients and
    without. Beyond its limit of 8, dynamo would run the block eagerly from then on, with no more than a warning.
    """
    with torch._dynamo.config.patch(recompile_limit=PLANS):  # noqa: SLF001 - it has no public name
        yield


def _with_many_plans(run: Run) -> Run:
    def patient(call: calls.Call) -> calls.Result:
        with many_plans():
            return run(call)

    return patient
