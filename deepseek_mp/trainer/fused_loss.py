"""The loss of a model that ends in a linear layer, computed from that layer's input: the logits are never there.

The layer multiplies only if somebody reads its output (`nn.deferred`); a step in which somebody does, or still holds it
when the forward is over, has the ordinary loss. In the first step the last linear layer that the model names is taken
to be the one. If it is another, that step runs as ever, with hooks: the output of the model has to be the very object
that a linear layer gave, so that nothing came after. The loss in chunks is compared with the loss function on a few
rows before it takes its place, in this step already. Whether scores are large is asked of each batch: a run that is
continued does what it would have done.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.monitor.internals import is_compiled
from deepseek_mp.nn import call as calls
from deepseek_mp.nn.chunked_loss import chunk_bytes
from deepseek_mp.nn.convert import current_plan
from deepseek_mp.nn.deferred import Deferred, LinearCall, deferring
from deepseek_mp.nn.known_loss import CrossEntropy, known_cross_entropy
from deepseek_mp.nn.loss import LossFn, is_integer
from deepseek_mp.nn.unit import Unit
from deepseek_mp.precision import Decision, PrecisionPlan, Reason
from deepseek_mp.trainer.compile import many_plans
from deepseek_mp.trainer.config import Compile, TrainerConfig

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer

COMPARED_ROWS = 64
"""Rows of a flat output that the two losses are compared on; of others one sequence."""
SMALL = "the output takes no more than a chunk"
"""Why the loss of this batch is not worth it, though that of a larger one may be."""
KEPT = "somebody keeps the model's output, who may read it when the step is over"
CLOSE = {torch.float32: 1e-3, torch.float64: 1e-6}
CLOSE_NARROW = 2e-2
"""How far the two may be apart, relative to the loss or 1: products of other shapes round differently."""
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")

Run = Callable[[calls.Call], calls.Result]
"""From a call to its loss."""


def check_fused_loss(config: TrainerConfig, loss_fn: LossFn | None) -> None:
    """`ConfigError` for True where the loss or the compiler makes it impossible, whatever the model is."""
    how = _how(loss_fn, config.compile)
    if config.fused_loss is True and isinstance(how, str):
        raise _refusal(how)


def with_fused_loss(run: Run, trainer: MixedPrecisionTrainer, plan: PrecisionPlan) -> Run:
    """`run`, or what computes the same without logits, where the trainer is to and it turns out to be possible.

    What was found is one of the run's decisions.
    """
    option = trainer.config.fused_loss
    if option is False:
        return run

    def said(layer: str, reason: Reason, detail: str) -> None:
        base = plan.base.name
        trainer.recorder.decided([Decision(layer=layer, old=base, new=base, reason=reason, detail=detail)])

    how = _how(trainer.loss_fn, trainer.config.compile)
    if isinstance(how, str) and option is not None:
        said("", Reason.LOSS_NOT_FUSED, how)
        return run
    return FusedLoss(
        trainer.model, trainer.loss_fn, how, ordinary=run, required=option is True, asked=option is not None, said=said
    )


def is_fused_by_default(plan: PrecisionPlan) -> bool:
    """Whether a trainer takes the loss in chunks where nobody has said anything.

    FP16 products wait for the loss scale, so that there the logits are multiplied once more.
    """
    return plan.base.region != "fp16"


def _how(loss_fn: LossFn | None, compile: Compile) -> CrossEntropy | str:
    if compile is True:
        return "a model compiled whole has the loss in it; compile='regional' leaves it out"
    return known_cross_entropy(loss_fn)


@dataclass(frozen=True, kw_only=True)
class _Ran:
    """A call of a linear layer that was not deferred, and what it gave."""

    call: LinearCall
    output: Tensor
    mark: tuple[Any, ...]


class FusedLoss:
    """From a call to its loss, like `calls.run` of the model and the loss function.

    Args:
        how: what the loss function computes, or why it cannot be fused, which is said where it matters.
        ordinary: from a call to its loss, where it is not fused.
        required: whether it is an error if the loss cannot be fused.
        asked: whether somebody has asked for it. Else nothing is tried, or said, of losses that it would change little.
        said: told once, by layer, reason and detail, which layer was found, or why there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn | None,
        how: CrossEntropy | str,
        *,
        ordinary: Run,
        required: bool,
        asked: bool = True,
        said: Callable[[str, Reason, str], None],
    ) -> None:
        self._model, self._loss_fn = model, loss_fn
        self._how, self._unknown = (CrossEntropy(), how) if isinstance(how, str) else (how, "")
        self.run, self._required, self._said = ordinary, required, said
        self._asked = asked
        self._plan: PrecisionPlan | None = None
        self._suits = True
        """Whether this plan is one in which the loss is fused where nobody has asked for it."""
        self._labels = -1
        """Of the largest batch that was looked at."""
        self.layer: nn.Linear | None = None
        """The model's last layer, once it was found."""
        self.why = ""
        """Why the loss is not fused, once that is known."""
        self._told = ""
        """The same, as it was said last."""
        self._path: list[nn.Module] = []
        """The modules that the layer is inside of, and itself: looked for once, since steps ask for their hooks."""

    def __call__(self, call: calls.Call) -> calls.Result:
        if not self._is_wanted(call):
            return self.run(call)
        with many_plans():
            return self._look(call) if self.layer is None else self._step(call, self.layer)

    def _is_wanted(self, call: calls.Call) -> bool:
        """Whether the loss of this batch may be computed in chunks, in the plan that is in force now."""
        if not self._asked and not self._suits_plan():
            return False
        if self.layer is not None:  # found by another batch
            return self._required or _may_be_large([self.layer], call.target)
        self._look_at(call)
        return not self.why

    def _suits_plan(self) -> bool:
        plan = current_plan(self._model)
        if plan is not self._plan:  # a plan takes a while to say its base, and steps are many
            self._plan, self._suits = plan, plan is None or is_fused_by_default(plan)
        return self._suits

    def _look_at(self, call: calls.Call) -> None:
        """Of the first batch, and of larger ones while all were small: whether it is worth being looked into.

        Where somebody has asked for it, the first one always is.
        """
        labels = call.target.numel() if isinstance(call.target, Tensor) else 0
        if labels <= self._labels:
            return
        is_first, self._labels = self._labels < 0, labels
        if (is_first and not self._asked) or self.why.startswith(SMALL):
            self.why = "" if _may_be_large(_uncompiled_layers(self._model), call.target) else SMALL
            if not self.why and self._unknown:
                self._give_up(self._unknown)

    def unread(self, call: calls.Call) -> AbstractContextManager[None]:
        """Context for a forward of the model whose output nobody reads: what a step would not compute it does not."""
        if not self._is_wanted(call):
            return nullcontext()
        last = self._likely() if self.layer is None else [self.layer]
        return deferring(last[0]) if last and _can_defer(last[0], self._path) else nullcontext()

    def _step(self, call: calls.Call, layer: nn.Linear) -> calls.Result:
        with deferring(layer) if _can_defer(layer, self._path) else nullcontext():
            output = calls.invoke(self._model, call)
        waits = isinstance(output, Deferred) and output.is_pending
        if waits and self._how.fits(output, call.target):
            last, left, output = output.call, weakref.ref(output), None
            output = None if self._required else left()
            if output is None:
                return self._fused(call, last)
        return self._ordinary(call, output)

    def _fused(self, call: calls.Call, last: LinearCall) -> calls.Result:
        with last.region():
            found = self._how.of(last.hidden, last.weight, last.bias, call.target)
        last.is_spent = True
        return calls.result(call, (found, "cross_entropy in chunks"), self._loss_fn)

    def _ordinary(self, call: calls.Call, output: Any) -> calls.Result:
        return calls.result(call, calls.loss_of(output, call.target, self._loss_fn), self._loss_fn, output=output)

    # -- the first step -------------------------------------------------------------------------

    def _look(self, call: calls.Call) -> calls.Result:
        ran: list[_Ran] = []
        likely = self._likely()
        others = [layer for layer in _uncompiled_layers(self._model) if layer not in likely]
        with self._watched(others, ran), deferring(likely[0]) if likely else nullcontext():
            output = calls.invoke(self._model, call)
        last = self._last(output, ran[-1] if ran else None)
        why = last if isinstance(last, str) else self._why_not(output, call.target, last)
        if why == "" and isinstance(last, LinearCall):
            size, left, output = 4 * output.numel(), weakref.ref(output), None
            ran.clear()
            output = None if self._required else left()
            if not isinstance(output, Deferred):  # others can be read whenever somebody likes
                del output
                self._found(last.layer, size)
                return self._fused(call, last)
            why = KEPT
        if why:
            self._give_up(why)
        return self._ordinary(call, output)

    def _likely(self) -> list[nn.Linear]:
        """The last layer that the model names, if its product may wait."""
        last = _uncompiled_layers(self._model)[-1:]
        return [layer for layer in last if _can_defer(layer, _path(self._model, layer))]

    def _found(self, layer: nn.Linear, size: int) -> None:
        self.layer, self._path = layer, _path(self._model, layer)
        name = next(name for name, module in self._model.named_modules() if module is layer)
        of_batch = f"{size / 2**20:.3g} MiB in FP32 for this batch"
        self._said(name, Reason.LOSS_FUSED, f"its output, {of_batch}, is computed in chunks inside of the loss")

    @staticmethod
    def _last(output: Any, ran: _Ran | None) -> LinearCall | str:
        """The call of a linear layer that gave the model's output, or why there is none."""
        if isinstance(output, Deferred):
            return output.call if output.is_pending else "the model's output is read before the loss"
        if not isinstance(output, Tensor) and calls.own_loss(output) is not None:
            return "the model computes its loss itself (in it, nn.linear_cross_entropy needs no logits)"
        if ran is None or output is not ran.output:
            return "the model's output is not, as it is, that of the last linear layer to run"
        if ran.mark != _mark(output):
            return "the last layer's output was changed in place"
        return ran.call

    def _give_up(self, why: str) -> None:
        if self._required:
            raise _refusal(why)
        self.why = why
        if why != self._told:
            self._said("", Reason.LOSS_NOT_FUSED, why)
        self._told = why

    def _why_not(self, output: Tensor, target: Any, last: LinearCall) -> str | None:
        """Why the loss cannot be fused: empty if it can, None if this batch does not tell."""
        if not last.is_unchanged or not output.requires_grad:
            return "the last layer's input or weight was changed in place, or it ran without gradients"
        if not self._how.fits(output, target):
            return "the target is not one whole number for each row of the output"
        if own := _own_precision(last.layer):
            return own
        chunk = chunk_bytes(output.device)
        if 4 * output.numel() <= chunk and not self._required:
            return f"{SMALL}, {chunk >> 20} MiB in FP32"
        return self._why_other(output, target, last)

    def _why_other(self, output: Tensor, target: Tensor, last: LinearCall) -> str | None:
        """How the two losses differ, on some rows."""
        rows = _rows_that_count(target, self._how.ignore_index)
        with last.region(), torch.no_grad():
            hidden = last.hidden.detach()[rows]
            # Its forward, since its hooks have seen this step already.
            scores = last.product(hidden) if isinstance(output, Deferred) else output.detach()[rows]
            theirs = _number(calls.loss_of(scores, target[rows], self._loss_fn)[0])
            ours = _number(self._how.of(hidden, last.weight, last.bias, target[rows]))
        if not (len(rows) and math.isfinite(theirs)):
            return None
        if abs(theirs - ours) <= CLOSE.get(output.dtype, CLOSE_NARROW) * max(1.0, abs(theirs)):
            return ""
        return f"the loss of some rows is {theirs:.6g}, and their cross entropy {ours:.6g}"

    @contextmanager
    def _watched(self, layers: Sequence[nn.Linear], ran: list[_Ran]) -> Iterator[None]:
        """Inside, `ran` holds the last call of one of the layers with one argument."""

        def left(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if len(args) == 1 and isinstance(layer, nn.Linear):
                ran[:] = [_Ran(call=LinearCall(layer, args[0]), output=output, mark=_mark(output))]

        handles = [layer.register_forward_hook(left) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _may_be_large(layers: Sequence[nn.Linear], target: object) -> bool:
    """Whether the scores for these labels, which one of the layers gives, may take more than a chunk."""
    if not (isinstance(target, Tensor) and is_integer(target)):
        return False
    widest = max((layer.out_features for layer in layers), default=0)
    return 4 * target.numel() * widest > chunk_bytes(target.device)


def _uncompiled_layers(model: nn.Module) -> list[nn.Linear]:
    """Those outside of compiled blocks: a hook in one would break its code into pieces, which stay when it is gone."""
    compiled = [module for module in model.modules() if is_compiled(module)]
    inside = {inner for module in compiled for inner in module.modules()}
    return [module for module in model.modules() if isinstance(module, nn.Linear) and module not in inside]


def _path(model: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """The modules that the layer is inside of, and itself."""
    parts = next(name for name, module in model.named_modules() if module is layer).split(".")
    return [model.get_submodule(".".join(parts[:n])) for n in range(len(parts) + 1)]


def _can_defer(layer: nn.Linear, around: Sequence[nn.Module]) -> bool:
    """Whether the layer's product is a plain one, of the layer itself, and no hook needs its output on the way back."""
    hooked = any(getattr(module, hooks) for module in around for hooks in _BACKWARD_HOOKS)
    # The forward of a replica would be that of the layer it is a copy of, on another device.
    copied = any(isinstance(module, nn.DataParallel) and len(module.device_ids) > 1 for module in around)
    return not hooked and not copied and not _own_precision(layer)


def _mark(output: Tensor) -> tuple[Any, ...]:
    """What is equal as long as nobody writes to it."""
    return output._version, output.grad_fn  # noqa: SLF001 - there is no public one


def _own_precision(layer: nn.Linear) -> str:
    """Why the layer's product is not that of a plain linear layer in the region around it; empty if it is."""
    if not isinstance(layer, Unit) or layer.original_class is not nn.Linear:
        return f"the last layer is a {type(layer).__name__} with a forward of its own"
    precision = layer.unit_precision
    if precision.region is not None or precision.products is not None or precision.rounds:
        return f"the last layer runs in {precision.recipe.name}, beside the rest of the model"
    return ""


def _number(loss: Any) -> float:
    return float(loss[0] if isinstance(loss, tuple) else loss)


def _rows_that_count(target: Tensor, ignored: int) -> Tensor:
    """Places along the first dimension that have labels: some of a flat target, else the one that has most."""
    counts = (target != ignored).flatten(1).sum(1) if target.dim() > 1 else (target != ignored).long()
    most = COMPARED_ROWS if target.dim() == 1 else 1
    return counts.topk(min(most, int(counts.count_nonzero()))).indices


def _refusal(why: str) -> ConfigError:
    allowed = "it where the model's output is its last linear layer's and the loss its cross entropy"
    return ConfigError(explain(f"fused_loss=True, but {why}", allowed, "Use fused_loss='auto' or False"))
