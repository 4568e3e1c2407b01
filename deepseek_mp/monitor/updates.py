"""What an optimizer step does to a weight, from hooks around it: how large it is, and what of it BF16 would lose."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from deepseek_mp.monitor.store import UPDATE, Store
from deepseek_mp.monitor.subjects import Choice, Subject, outputs_first, weight_rows
from deepseek_mp.ops.gradients import l2_norm
from deepseek_mp.ops.moved import moved
from deepseek_mp.ops.own_work import own_work
from deepseek_mp.ops.storage_marks import storage_of
from deepseek_mp.ops.updates import effective_quality, kept_by_nearest, lost_share
from deepseek_mp.optim.offload.stepped import settle, stepped
from deepseek_mp.optim.states import moment_rows

UPDATE_FIELDS = ("ratio", "lost", "edq", "grad_norm", "spike", "rms")
"""What is known of an update, with w the weight, dw what the step adds to it and g the gradient that the optimizer is
given, clipped if it was. All but the norm are over the sampled rows.

ratio      |dw| / |w|
lost       share of dw other than zero that a weight rounded to the nearest BF16 value would lose (`ops.updates`). Of a
           weight that is stored in 16 bits already: share of g other than zero where dw = 0
edq        what would arrive of dw, 1 if nothing is lost (`ops.updates`). Not known of a weight that is stored in 16
           bits already
grad_norm  |g|, of the whole gradient
spike      |g| over its exponential mean before this step
rms        sqrt(mean(g^2 / max(v, eps^2))) with Adam's second moment v, without its bias, after this step
           ("Stable and low-precision training", arXiv 2304.13013): above 1 if the gradient has outgrown it
"""
GRAD_NORM = UPDATE_FIELDS.index("grad_norm")


@dataclass(frozen=True, kw_only=True)
class _Before:
    """One weight as the optimizer found it."""

    subject: Subject
    rows: range
    weight: Tensor
    gradient: Tensor
    norm: Tensor
    skip: Tensor | None
    """[]: other than 0 where a fused kernel leaves everything as it is."""


class UpdateWatch:
    """Looks at the next step of an optimizer, once."""

    def __init__(
        self, optimizer: Optimizer, subjects: Sequence[Subject], store: Store, choice: Choice, done: Callable[[], None]
    ) -> None:
        self.is_done = False
        self._optimizer, self._subjects, self._store, self._choice = optimizer, subjects, store, choice
        self._done = done
        self._before: list[_Before] = []
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._look),
            optimizer.register_step_post_hook(self._compare),
        ]

    def remove(self) -> None:
        """Take the hooks away; not from inside of them, since PyTorch goes through them then."""
        self.is_done = True
        self._before = []
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _look(self, optimizer: Optimizer, *_: Any) -> None:
        if self.is_done:
            return
        # What a fused kernel will divide the gradients by, and whether it will skip.
        divisor, skip = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        settle(optimizer)
        with own_work():
            for subject in self._subjects:
                given = stepped(optimizer, subject.weight)
                gradient = given.grad
                if gradient is None or gradient.layout != torch.strided or not gradient.numel():
                    continue
                norm = l2_norm([gradient]).float()
                rows = self._choice.of(outputs_first(given, subject).shape[0])
                part = weight_rows(gradient, subject, rows, 1).float()
                if divisor is not None:
                    norm, part = norm / divisor, part / moved(divisor, part.device)
                weight = weight_rows(given, subject, rows, 1)
                found = _Before(subject=subject, rows=rows, weight=weight, gradient=part, norm=norm, skip=skip)
                self._before.append(found)

    def _compare(self, optimizer: Optimizer, *_: Any) -> None:
        if self.is_done:
            return
        with own_work():
            for before in self._before:
                self._add(optimizer, before)
        self._before = []
        self.is_done = True
        self._done()

    def _add(self, optimizer: Optimizer, before: _Before) -> None:
        subject = before.subject
        now = stepped(optimizer, subject.weight)
        weight, after = before.weight.float(), weight_rows(now, subject, before.rows, 1).float()
        change = after - weight
        size = _norm(change)
        usual = self._store.corrected(subject.index, UPDATE, GRAD_NORM)
        norm = moved(before.norm, usual.device)
        line = [
            _quotient(size, _norm(weight)),
            *_lost(before, weight, change),
            before.norm,
            torch.where(usual > 0, _quotient(norm, usual), 1.0),
            _rms(optimizer, before),
        ]
        block = torch.stack([moved(value, usual.device) for value in line])[None]
        # A step that was skipped on the device, or had a rate of zero, says nothing.
        self._store.add(
            subject.index, UPDATE, block, valid=before.norm.isfinite() & ((size > 0) | _was_asked(optimizer, before))
        )


def _norm(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x)
    return norm


def _quotient(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where whole is 0: an infinity would stay in a mean for good."""
    return torch.where(whole > 0, part / whole, 0.0)


def _lost(before: _Before, weight: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    """`lost` and `edq`."""
    if before.weight.dtype.itemsize < torch.float32.itemsize:
        asked = before.gradient != 0
        unknown = torch.full((), float("nan"), device=weight.device)
        return (asked & (change == 0)).sum() / asked.sum(), unknown
    kept = kept_by_nearest(weight, change)
    return lost_share(kept, change), effective_quality(kept, change)


def _was_asked(optimizer: Optimizer, before: _Before) -> Tensor:
    """Whether a weight in 16 bits that nobody looks after was to move, bool []: if it did not, all of it was lost."""
    asked, weight = (before.gradient != 0).any(), stepped(optimizer, before.subject.weight)
    rate = _group_of(optimizer, weight).get("lr", 0.0)
    if before.weight.dtype.itemsize >= torch.float32.itemsize or storage_of(weight) is not None:
        return torch.zeros_like(asked)
    if before.skip is not None:
        asked = asked & (before.skip.to(asked.device, non_blocking=True).reshape(()) == 0)
    moves = rate.to(asked.device, non_blocking=True).reshape(()) if isinstance(rate, Tensor) else rate
    return asked & (moves != 0)


def _group_of(optimizer: Optimizer, weight: Tensor) -> dict[str, Any]:
    """The options of the weight's group; none if it is another optimizer's."""
    groups = (group for group in optimizer.param_groups if any(p is weight for p in group["params"]))
    return next(groups, {})


def _rms(optimizer: Optimizer, before: _Before) -> Tensor:
    """The gradient over its second moment; NaN if the optimizer keeps none."""
    weight = stepped(optimizer, before.subject.weight)
    moment = moment_rows(optimizer.state.get(weight, {}), "exp_avg_sq", weight)
    if moment is None:
        return torch.full((), float("nan"), device=before.norm.device)
    second = weight_rows(moment, before.subject, before.rows, 1).float()
    group = _group_of(optimizer, weight)
    step = optimizer.state[weight].get("step")
    if step is not None and "betas" in group:
        second = second / (1 - group["betas"][1] ** step)
    return (before.gradient.square() / second.clamp_min(group.get("eps", 1e-8) ** 2)).mean().sqrt()
