"""One training step as a transaction: it is applied, or everything is as it was.

    window opens    remember the buffers
    micro-batch     forward and loss in the plan's region, backward of the weighted, scaled loss
    window is full  settle the step before this one, then unscale, check, clip, apply or skip

Settling a step means learning whether it was applied and acting on it: the scheduler, the average of
the weights, counters and records move only for applied steps, and a skipped step is replayed to name
the module that produced the first non-finite value. On an accelerator a step is settled just before
the next one is applied, when the device has long finished it: the host reads a copy that is already
there, and runs ahead of the device as it would without any check. On a CPU it is settled at once.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepseek_mp import backends
from deepseek_mp.controller.scaler import LossScaler, Verdict
from deepseek_mp.errors import ConfigError, NonFiniteError, explain
from deepseek_mp.monitor import PrecisionMonitor
from deepseek_mp.nn import call as calls
from deepseek_mp.nn.convert import current_plan
from deepseek_mp.nn.delayed import Saturated, place_scales, scales_of
from deepseek_mp.nn.held import HeldWeights
from deepseek_mp.nn.loss import LossFn
from deepseek_mp.nn.weight_casts import WeightCasts
from deepseek_mp.ops import gradients
from deepseek_mp.ops.dtypes import torch_dtype
from deepseek_mp.ops.host_copy import HostCopy
from deepseek_mp.ops.storage_marks import take_gradients
from deepseek_mp.trainer import offloaded, state
from deepseek_mp.trainer.budget import run_within_budget
from deepseek_mp.trainer.buffers import BufferGuard
from deepseek_mp.trainer.eager_pools import EagerPools
from deepseek_mp.trainer.failed_step import let_go, undone_if_it_fails
from deepseek_mp.trainer.region import Region
from deepseek_mp.trainer.replay import find_first_bad_module
from deepseek_mp.trainer.result import StepFacts, StepResult
from deepseek_mp.trainer.rng import get_rng, set_rng
from deepseek_mp.trainer.step_flops import counted
from deepseek_mp.trainer.window import MicroBatch, Weight, Window

log = logging.getLogger("deepseek_mp")

NO_ITEMS = "no batch of the window has items"
VETOED = "what the step was computed with does not hold for its numbers"
NO_GRADIENTS = "no parameter of the optimizer received a gradient"
SLOWER_IN_ONE_PASS = ("cpu",)
"""Devices on which weights are left to autocast: a CPU saves no launches, and casts a gradient best while it is cached.
Compiled code is left alone everywhere: it casts weights inside of what it does with them."""
_FIXED_SCALES = ("none", "static")
"""Policies whose loss scale does not depend on whether a step was finite."""
_FACTS = 6
"""Numbers of a step that are copied to the host, before those about delayed scales."""


@dataclass(kw_only=True)
class Pending:
    """A closed window whose outcome is not known on the host yet."""

    window: Window
    verdict: Verdict
    copy: HostCopy
    facts: StepFacts | None = None


def _marks(params: list[Tensor]) -> list[tuple[int, int]]:
    """What changes when a parameter is written: its version, or where its values lie."""
    return [(param._version, param.data_ptr()) for param in params]  # noqa: SLF001 - there is no public one


class Stepper:
    """Runs micro-batches and closes windows.

    Args:
        model: the converted model.
        compute: from a call to its loss: `calls.run` of model and loss, or its compiled form.
        finished: called once per settled window with its facts.
        before: called on unscaled gradients before they are checked, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        compute: Callable[[calls.Call], calls.Result],
        pools: EagerPools,
        loss_fn: LossFn | None,
        optimizer: Optimizer,
        scaler: LossScaler,
        region: Region,
        device: torch.device,
        accumulation: int,
        max_grad_norm: float | None,
        max_skipped: int,
        compiled: bool,
        counts: bool,
        monitor: PrecisionMonitor,
        monitor_every: int,
        finished: Callable[[StepFacts, Window], None],
        before: Callable[[], None] | None,
    ) -> None:
        self.model, self.compute, self.loss_fn = model, compute, loss_fn
        self.optimizer, self.device = optimizer, device
        self.accumulation, self.max_grad_norm, self.max_skipped = accumulation, max_grad_norm, max_skipped
        self.monitor, self.monitor_every = monitor, monitor_every
        self.finished, self.before, self.window = finished, before, Window()
        self._trained: list[int] = []
        """The ids of the optimizer's parameters when all were listed, which keeps them alive."""
        self._list_parameters()
        self._buffers = BufferGuard(model, loss_fn)
        self._weights, self._pools = HeldWeights(model), pools
        # In compiled code the cache is part of what is compiled for, and a cast is shared anyway.
        self._looked = self._compiled = compiled
        self._lends = offloaded.may_come_together(optimizer)
        self.change_plan(region, scaler)
        self._weights_move = self._loss_named = self._warned_scale = False
        self.counts = counts
        """Whether some steps are counted: of compiled code they run uncompiled, and hold what eager code holds."""
        self._pending: Pending | None = None
        self.windows_opened = self.skipped_in_row = 0
        self._before: tuple[Weight | None, int, bool] = None, 0, compiled
        """`largest`, `windows_opened` and whether a forward was looked at, before the open window."""
        self.closing = False
        """Whether a window is between full and done: what callbacks see then is no state to save."""
        self.veto: Callable[[], Tensor | None] | None = None
        """Asked once for each window that closes, in order: 0-dim, 1 on the device takes the step back without blaming
        the loss scale, unless the step is not finite."""
        self.flops: int | None = None
        """Floating-point operations of a micro-batch, forward and backward, once one was sampled."""

    def change_plan(self, region: Region, scaler: LossScaler) -> None:
        """Go on with the model as it is converted now; no window is open, and the last one is settled."""
        self.region, self.scaler, self._plan = region, scaler, current_plan(self.model)
        lends = region.casts and not self._compiled and self.device.type not in SLOWER_IN_ONE_PASS and self._lends
        self._casts = WeightCasts(self.model, torch_dtype(region.format)) if lends else None
        place_scales(self.model)  # the model may have moved to its device after the plan was applied

    def run(self, batch: Any, *, index: int = 0, close: bool | None = None) -> StepResult:
        """One micro-batch; the window closes when it is full, or as `close` says."""
        self._check_plan()
        call = calls.parse_batch(batch)
        samples = calls.batch_size(call)
        if not self.window.micro_batches:
            self._open()
        self.window.micro_batches += 1
        closing = self.window.micro_batches >= self.accumulation if close is None else close
        whole = closing and self.window.micro_batches == 1
        take_gradients(self._parameters, add_up=not whole)
        try:
            loss = self._compute(batch, call, index, whole=whole) if samples else None
            self.window.samples += samples
            if closing:
                return self.close()
        except BaseException as error:
            self.abandon()
            let_go(error, self.device)
            raise
        if loss is None:
            return StepResult(lambda: StepFacts(status="accumulated", reason="the batch has no items"))
        kept, scale = loss.detach(), self.scaler.policy.scale.clone()
        return StepResult(lambda: StepFacts(status="accumulated", loss=float(kept), scale=float(scale)))

    def _check_plan(self) -> None:
        """`ConfigError` if somebody else converted the model since: layers would not be in the region's arithmetic."""
        now = current_plan(self.model)
        if now is not self._plan and (now is None or self._plan is None or now.digest != self._plan.digest):
            here, was = ("no plan" if plan is None else f"plan {plan.base}" for plan in (now, self._plan))
            passed = f"a model that has {here} in force now, not {was} of its trainer"
            change = "Call trainer.change_plan(trainer.plan) between two steps, or give each trainer a model of its own"
            raise ConfigError(explain(passed, "changes by the trainer itself", change))
        self._plan = now

    @property
    def unsettled(self) -> bool:
        """Whether the outcome of the last closed window is still to be learned."""
        return self._pending is not None

    def save_window(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The open window as tensors and JSON values; without tensors if none is open.

        And what is known of casts: one cast of a weight that is used twice has its gradients added up in the narrow
        format, and two casts in FP32, so that a run which looked at its first forward anew would have other bits.
        """
        values = self.window.save() | {"looked": self._looked, "weights_move": self._weights_move}
        if not self.window.micro_batches:
            return {}, values
        tensors = {f"gradient.{name}": g for name, g in state.gradients(self.model, self.optimizer).items()}
        tensors |= {f"buffer.{name}": b for name, b in self._buffers.saved().items()}
        return tensors, values

    def load_window(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Reopen a window that `save_window` returned."""
        self.window = Window.load(values, self.device)
        self._looked = self._compiled or values["looked"]
        self._before = self.window.largest, self.windows_opened, self._looked
        self._weights_move = values["weights_move"]
        if not self.window.micro_batches:
            return
        parts: dict[str, dict[str, Tensor]] = {"gradient": {}, "buffer": {}}
        for name, tensor in tensors.items():
            kind, rest = name.split(".", 1)
            parts[kind][rest] = tensor
        state.load_gradients(self.model, self.optimizer, parts["gradient"])
        self._buffers.load_saved(parts["buffer"])

    def _list_parameters(self) -> None:
        """Those of the model and the optimizer, again if it was given others: no gradient is to outlive its step."""
        trained = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
        if trained != self._trained:
            self._trained, self._parameters = trained, offloaded.without_masters(self.model, self.optimizer)
            self._frozen = [p for p in self._parameters if not p.requires_grad]

    def _clear_gradients(self) -> None:
        """No parameter of the model or the optimizer has a gradient (Module.zero_grad walks the model)."""
        offloaded.between_steps(self.optimizer)
        for param in self._parameters:
            param.grad = None

    def _open(self) -> None:
        self._list_parameters()
        self._clear_gradients()
        self._buffers.snapshot()
        backends.clear_overflow(self.device)
        self._before = self.window.largest, self.windows_opened, self._looked
        self.windows_opened += 1

    def _compute(self, batch: Any, call: calls.Call, index: int, *, whole: bool) -> Tensor | None:
        """Forward, loss and backward of one micro-batch; returns its loss, None if it has no items."""
        self.window.entries.append(MicroBatch(index=index, batch=batch, rng=get_rng(self.device)))
        with self._sampled(), self._pools.in_force(), self.region.flags(), self._same_weights():
            # Named nowhere here: what backward does not need of it, such as FP32 images, ends with forward.
            loss, items = self._forward(calls.move(call, self.device))
            if isinstance(items, int) and items == 0:
                return None  # every label is masked: a mean over nothing
            weight = self.window.weigh(items, whole=whole)
            self.window.add(loss, weight)
            scaled = self.scaler.scale(loss if whole else loss * weight)
            with backends.autocast(self.device, "fp32"):  # a region of the caller's would cast backward's products
                scaled.backward()
        return loss

    def _forward(self, call: calls.Call) -> tuple[Tensor, int | Tensor]:
        """Loss and item count. The output ends here: backward need not keep the logits in memory.

        A forward that changes a weight between two uses of it must not find the cast of the old one.
        So casts are cached only once a forward was seen to change none, and no more when one does.
        """
        cache = self._looked and not self._weights_move
        before, frozen = self._versions(), _marks(self._frozen)
        with self.region.autocast(cache=cache):
            result = self.compute(call)
        if self._casts is not None:
            self._casts.forward_ended()
        written = [p for p, was, now in zip(self._frozen, frozen, _marks(self._frozen), strict=True) if was != now]
        if written:  # a momentum encoder, say; its first change, before it was known as such, is not kept
            self._buffers.keep(written)
        torch.clear_autocast_cache()  # inside a region of the caller's, ours would leave its casts behind
        if self._versions() != before and not self._weights_move:
            self._weights_move = True
            if cache:
                log.warning("this forward changed weights in place; from now on no cast of a weight is reused")
        if not self._loss_named:
            log.info("the loss is %s", result.loss_name)
            self._loss_named = True
        self._looked = True
        return result.loss, result.items

    @contextmanager
    def _same_weights(self) -> Iterator[None]:
        """Context in which layers use weights quantised, or cast, once: for all micro-batches of a window."""
        if not self._looked or self._weights_move:
            yield
            return
        plan, mark = current_plan(self.model), None
        # A hook behind the accumulation may step an optimizer there, and fused ones leave no mark on a weight.
        if self.accumulation > 1 and not offloaded.step_in_backward(self._parameters, self.optimizer):
            mark = _marks(self._parameters), plan
        quantised = nullcontext() if mark is None else self._weights.lent(mark)
        with quantised, nullcontext() if self._casts is None else self._casts.lent(plan, mark):
            yield

    def _forget_weights(self) -> None:
        self._weights.drop()
        if self._casts is not None:
            self._casts.drop()

    def _versions(self) -> int:
        """Grows with every change in place of any parameter, but for those that fused kernels make."""
        if not self.region.casts:
            return 0
        return sum([param._version for param in self._parameters])  # noqa: SLF001 - there is no public one

    @contextmanager
    def _sampled(self) -> Iterator[None]:
        """The first step after a report, and then every `monitor_every`-th, is counted with its FLOPs."""
        known = self.flops is not None and self.monitor.has_sample
        if not self.counts or (known and self.windows_opened % self.monitor_every):
            yield
            return
        with counted(self.monitor, compiled=self._compiled) as counter, self._pools.in_force(compiled_too=True):
            yield
        self.flops = counter.get_total_flops()

    def close(self) -> StepResult:
        """Close the window as it is: settle the step before it, then apply or skip it."""
        self.closing = True
        self._forget_weights()
        try:
            return self._close()
        finally:
            self.closing = False

    def _close(self) -> StepResult:
        flag = backends.overflow_seen(self.device)  # first: a replay of the step before may raise it again
        veto = None if self.veto is None else self.veto()  # and look at other inputs
        self.settle()
        window = self.window
        if window.loss is None:
            self._buffers.restore()
            self._discard_maxima()
            self.window = Window(largest=window.largest)
            facts = StepFacts(status="no_grads", reason=NO_ITEMS)
            self.finished(facts, window)
            return StepResult(lambda: facts)
        nonfinite, divisor = window.nonfinite, window.divisor
        if flag is not None and nonfinite is not None:
            nonfinite = torch.maximum(nonfinite, flag)
        empty = window.empty
        if veto is not None:
            veto = self._where_finite(veto, nonfinite, empty)
            empty = veto if empty is None else torch.maximum(empty.to(veto), veto)
        with undone_if_it_fails(self.optimizer):
            verdict = self.scaler.step(
                self.optimizer,
                max_grad_norm=self.max_grad_norm,
                divisor=divisor,
                nonfinite=nonfinite,
                empty=empty,
                before=self.before,
            )
        self.window = Window(largest=window.largest)  # not before: if the step raises, `abandon` takes this window back
        if verdict.status is None:
            self._buffers.restore_where(verdict.skipped)
        elif verdict.status != "applied":
            self._buffers.restore()
        self._clear_gradients()
        copy = HostCopy([
            window.mean_loss(divisor), verdict.nonfinite, verdict.skipped, verdict.grad_norm, verdict.scale,
            torch.zeros_like(verdict.skipped) if veto is None else veto, *self._update_scales(),
        ])  # fmt: skip
        pending = self._pending = Pending(window=window, verdict=verdict, copy=copy)
        if verdict.status is not None:
            self.settle()
        return StepResult(lambda: self._facts_of(pending))

    def _where_finite(self, veto: Tensor, nonfinite: Tensor | None, empty: Tensor | None) -> Tensor:
        """The veto, and 0 where a window is no step anyway: where it has no items, or its numbers are not finite.

        Gradients are asked only where a loss scale hangs on it: that is one more pass over them.
        """
        found = [flag for flag in (nonfinite, empty) if flag is not None]
        if self.scaler.policy.name not in _FIXED_SCALES:
            params = offloaded.with_gradients(self.optimizer)
            if params:
                found.append(gradients.l2_norm(gradients.gradient_views(params)).isfinite().logical_not())
        for flag in found:
            veto = veto.masked_fill(flag.to(veto.device, torch.bool, non_blocking=True), 0.0)
        return veto

    def _update_scales(self) -> list[Tensor]:
        """Delayed scales for the next window, and how many tensors outgrew theirs in this one: one number per device.

        A skipped window counts too: what was too large in it is what the next one must be able to hold.
        """
        found = scales_of(self.model)
        for scales in found:
            scales.update()
        return [scales.grown.sum() for scales in found]

    def _discard_maxima(self) -> None:
        for scales in scales_of(self.model):
            scales.discard()

    def _facts_of(self, pending: Pending) -> StepFacts:
        if pending.facts is None:
            self.settle()
        assert pending.facts is not None, "settling a window gives its facts"
        return pending.facts

    def settle(self) -> None:
        """Learn the outcome of the last closed window and act on it; waits for the device."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        facts = pending.facts = replace(self._read(pending), saturated=self._saturated(pending))
        failed = facts.status == "skipped" and facts.reason != VETOED  # a veto's cause is mended by who spoke it
        if facts.status == "applied":
            self.skipped_in_row = 0
        elif facts.status == "skipped":
            self.skipped_in_row += failed
            log.warning("step skipped: %s (first bad module: %s)", facts.reason, facts.first_bad_module)
        self._warn_small_scale(facts)
        self.finished(facts, pending.window)
        if failed and self.skipped_in_row >= self.max_skipped:
            raise self._too_many_skips(facts)

    def _read(self, pending: Pending) -> StepFacts:
        loss, nonfinite, skipped, norm, scale, vetoed = pending.copy.numbers()[:_FACTS]
        if not skipped:
            return StepFacts(status="applied", loss=loss, scale=scale, grad_norm=norm)
        if pending.verdict.status == "no_grads":
            return StepFacts(status="no_grads", reason=NO_GRADIENTS, loss=loss, scale=scale)
        nonfinite = nonfinite or (vetoed and not math.isfinite(norm))
        if not nonfinite and vetoed:
            return StepFacts(status="skipped", reason=VETOED, loss=loss, scale=scale, grad_norm=norm)
        if not nonfinite:
            return StepFacts(status="no_grads", reason=NO_ITEMS, scale=scale)
        if not math.isfinite(loss):
            reason = f"the loss is {loss}"
        else:
            reason = "the device saw an overflow" if math.isfinite(norm) else "the gradients are not finite"
        culprit = self._replay(pending.window, scale)
        return StepFacts(
            status="skipped", reason=reason, loss=loss, scale=scale, grad_norm=norm, first_bad_module=culprit
        )

    def _saturated(self, pending: Pending) -> tuple[Saturated, ...]:
        """The tensors that outgrew their scales; the device is asked only if there are any."""
        if not any(pending.copy.numbers()[_FACTS:]):
            return ()
        return tuple(found for scales in scales_of(self.model) for found in scales.just_grown())

    def _replay(self, window: Window, scale: float) -> str | None:
        """The first module to produce a non-finite value when the window is run again."""

        def compute(entry: MicroBatch) -> Tensor:
            call = calls.move(calls.parse_batch(entry.batch), self.device)
            with self._pools.in_force(), self.region.flags():
                with self.region.autocast(cache=False):
                    loss = run_within_budget(self.compute, self.model, call, self.loss_fn).loss
                with backends.autocast(self.device, "fp32"):
                    (loss * scale).backward()
            return loss

        guard = BufferGuard(self.model, self.loss_fn)
        guard.keep([*self._buffers.more, *(amax for scales in scales_of(self.model) for amax in scales.amax)])
        guard.snapshot()
        try:
            with self.monitor.paused(), offloaded.paused(self.optimizer):
                return find_first_bad_module(self.model, window.entries, compute, self.device, others=self._parameters)
        finally:
            guard.restore()

    def _warn_small_scale(self, facts: StepFacts) -> None:
        if facts.scale >= 1.0 or self._warned_scale:
            return
        self._warned_scale = True
        warnings.warn(
            f"the loss scale fell to {facts.scale}: gradients overflow fp16 without any scaling. "
            "Train in bf16, or pin the module that overflows to fp32"
            + (f" ({facts.first_bad_module})." if facts.first_bad_module else "."),
            stacklevel=2,
        )

    def _too_many_skips(self, facts: StepFacts) -> NonFiniteError:
        place = repr(facts.first_bad_module) if facts.first_bad_module else "no single module"
        return NonFiniteError(
            f"{self.skipped_in_row} steps in a row were skipped, the last because {facts.reason} "
            f"(first bad module: {place}, loss scale {facts.scale}). Parameters are those of the last good step. "
            "Look at that module's input, lower the learning rate, or pin it to fp32 with pin={...}.",
            first_bad_module=facts.first_bad_module,
            skipped=self.skipped_in_row,
        )

    def abandon(self) -> None:
        """Give up the open window: gradients cleared, buffers, counters and random state as when it opened."""
        largest = self.window.largest
        if self.window.micro_batches:
            self._buffers.restore()
            self._discard_maxima()
            if self.window.entries:
                set_rng(self.window.entries[0].rng, self.device)
            largest, self.windows_opened, self._looked = self._before
        self.window = Window(largest=largest)
        self._forget_weights()
        torch.clear_autocast_cache()
        self._clear_gradients()
