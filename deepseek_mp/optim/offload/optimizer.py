"""`OffloadedOptimizer`: AdamW whose FP32 weights, states and accumulated gradients are on the host.

To the outside it is AdamW over FP32 parameters on the host, the masters: its groups hold these, and so do loss scalers,
schedulers, clipping and states. The model's parameters have hooks that send each gradient down while backward runs, and
get their new values back at the end of a step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim import Optimizer

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.ops.gradients import l2_norm, l2_norm_of
from deepseek_mp.ops.storage_marks import mark_master, unmark
from deepseek_mp.optim.adamw import check_options
from deepseek_mp.optim.offload import rule, schedule
from deepseek_mp.optim.offload.arena import HostMemory
from deepseek_mp.optim.offload.crew import Crew
from deepseek_mp.optim.offload.delayed_step import DelayedStep
from deepseek_mp.optim.offload.device_part import DevicePart
from deepseek_mp.optim.offload.forward_waits import ForwardWaits
from deepseek_mp.optim.offload.grad_norm import total_norm
from deepseek_mp.optim.offload.host_chunk import HostChunk, Member, Memory
from deepseek_mp.optim.offload.immediate_step import ImmediateStep
from deepseek_mp.optim.offload.lanes import DirectLanes, Lanes, lanes_for
from deepseek_mp.optim.offload.loaded_state import MASTER, check_entries, check_loaded, check_rule
from deepseek_mp.optim.offload.master_weights import Pair
from deepseek_mp.optim.offload.pieces import Slot
from deepseek_mp.optim.offload.settings import OffloadSettings, StepReport
from deepseek_mp.optim.offload.speculative_step import SpeculativeStep
from deepseek_mp.optim.offload.sync_step import Parts, SyncStep
from deepseek_mp.optim.offload.trained import as_groups, check_model, check_parameters, members_of
from deepseek_mp.optim.offload.verdict import judge
from deepseek_mp.optim.offload.worker import ThreadWorker, Worker

_WIRES = {"bf16": torch.bfloat16, "fp32": torch.float32, None: None}


class OffloadedOptimizer(Optimizer):
    """AdamW on the host for a model on a device.

    Gradients go down while backward runs and are added up on the host in FP32. `step` updates the masters chunk by
    chunk and sends each chunk's weights up when it is done; forward waits for a chunk where it first reads it. `step`
    is a transaction: it is applied whole, skipped, or raises with everything as it was before. It ends the window of
    accumulation: gradients are released then, and after a failure they stay. Mode 'immediate' is none: its host works
    beside the next forward, whoever needs the weights next finds that it has failed, and a state must be loaded then.

    Read weights other than through the model's forward or `state_dict` only after `synchronize`.

    Args:
        params: parameters of one device in FP32, BF16 or FP16, or groups of them, in the order of execution.
        lr: a number, or a tensor [].
        betas: of both moments.
        eps: added to the root of the second moment.
        weight_decay: times the rate, taken off the weight.
        model: that has the parameters. Without it, the device waits for all weights at the end of `step`.
        settings: how it is offloaded.
        lanes: makes the copies of a device.
        worker: makes what runs the host's work beside the device.
        memory: of the host, which `close` gives the arenas back to; masters and states are no more after that.

    Raises:
        ConfigError: an option out of its range; parameters of other dtypes or of several devices.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        model: nn.Module | None = None,
        settings: OffloadSettings | None = None,
        lanes: Callable[[torch.device], Lanes] = lanes_for,
        worker: Callable[[], Worker] = ThreadWorker,
        memory: HostMemory | None = None,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.settings = settings or OffloadSettings()
        if not isinstance(self.settings, OffloadSettings):
            passed, change = f"settings={settings!r}", "Write for example OffloadSettings(mode='sync')"
            raise ConfigError(explain(passed, "OffloadSettings", change))
        self.report: StepReport | None = None
        """What the last step did."""
        groups = as_groups(params)
        check_rule(groups, "a group")
        for group in groups:
            check_options(**{name: group.get(name, value) for name, value in defaults.items()})
        parameters = [p for group in groups for p in group["params"]]
        device = check_parameters(parameters)
        if model is not None:
            check_model(model, parameters)
        self._lanes, self._memory, self._crew = lanes(device), memory, Crew()
        self._waits = ForwardWaits(self._lanes)
        self._chunks: list[HostChunk] = []
        self._pairs: dict[int, Pair] = {}
        self._handles: list[Any] = []
        self._chunk_of: dict[int, HostChunk] = {}
        self._task = -1
        self._passes = 0
        self._is_paused = False
        masters = self._take_over(members_of(groups), device)
        taken = [{**group, "params": [masters[id(p)] for p in group["params"]]} for group in groups]
        super().__init__(taken, {**defaults, **rule.OPTIONS})
        me = weakref.ref(self)
        self._mode = self._make_mode(me, worker)
        # Hooks would pile up on a model that outlives one optimizer after the other.
        weakref.finalize(self, self._waits.release, self._handles).atexit = False
        if model is not None:
            slots = [(slot.parameter, chunk.number) for chunk in self._chunks for slot in chunk.slots]
            self._waits.attach(model, slots, reading=lambda: _synchronize(me()))

    # ------------------------------------------------------------------------------------- what it has

    @property
    def split(self) -> schedule.Split:
        """Which chunks are on the host, in the order of arrival of their gradients, and which stay on the device."""
        return self._split

    @property
    def pinned(self) -> bool:
        """Whether all memory that is copied from and to is pinned."""
        return not self.pinning_refused and any(arena.pinned for chunk in self._chunks for arena in chunk.arenas)

    @property
    def pinning_refused(self) -> str | None:
        """Why pinned memory could not be had, where it was asked for."""
        return next((arena.refused for chunk in self._chunks for arena in chunk.arenas if arena.refused), None)

    @property
    def pairs(self) -> Sequence[Pair]:
        """Each parameter of the model that is trained, and its master."""
        return list(self._pairs.values())

    @property
    def waits_in_forward(self) -> bool:
        """Whether hooks of the model wait for weights where they are read; else the end of `step` does."""
        return self._waits.attached

    def trains(self, parameter: Tensor) -> bool:
        """Whether it was made for this parameter of the model."""
        return id(parameter) in self._pairs

    def hooks(self, parameter: Tensor) -> bool:
        """Whether it has a hook behind the accumulation of this parameter's gradient."""
        return self.trains(parameter) and self._pairs[id(parameter)].master is not parameter

    def master(self, parameter: Tensor) -> nn.Parameter:
        """The FP32 weight that a parameter is rounded from; the parameter itself if it is one."""
        if id(parameter) in self._pairs:
            return self._pairs[id(parameter)].master
        passed = f"a parameter {list(parameter.shape)} that the optimizer does not train"
        raise ConfigError(explain(passed, "parameters that it was made for", "Pass the parameter of the model itself"))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """`ConfigError` once the optimizer is made: its memory and hooks are laid out for the parameters it has."""
        if hasattr(self, "_mode"):
            change = "Pass all parameters when it is made, those trained later with requires_grad=False until then"
            raise ConfigError(explain("a group for an OffloadedOptimizer that is made", "groups at the start", change))
        super().add_param_group(param_group)

    # ------------------------------------------------------------------------------------------ training

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of this window, also those on their way."""
        self._mode.forget()
        self._passes = 0
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the accumulated gradients; a `closure` is called first and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        try:
            self._judged_step()
        except BaseException:
            for name in ("grad_scale", "found_inf"):  # GradScaler multiplies by a scale that it finds at the next try
                self.__dict__.pop(name, None)
            raise
        return loss

    def _judged_step(self) -> None:
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        self._mode.gather(is_scaled=scale is not None or found is not None)
        unseen = self._mode.has_begun or any(chunk.is_pending for chunk in self._chunks)
        grads = self._gradients()
        verdict = judge(grads, self.settings, scale=scale, found_inf=found, norm=self._norm, unseen=unseen)
        self._mode.step(verdict)
        for group in self.param_groups:  # at once: PyTorch's `zero_grad` takes time in which a step may be interrupted
            for parameter in group["params"]:
                parameter.grad = None
        self.report = replace(verdict.report, redone=self._mode.redone)
        self._passes = 0

    def land(self) -> None:
        """Wait until all gradients that were sent are in the masters' `grad`.

        Needed only by who looks at them before `step`: in mode 'immediate', or where a window is shorter than
        `accumulation`. `ConfigError` if backward has begun the step (`begin`); `settle` and `synchronize` likewise.
        """
        self._land()

    def settle(self) -> None:
        """Bring masters and states to where the last `step` left them, for others to read before the next one.

        In mode 'delayed' this is what the next step begins with. In 'speculative' chunks are put back that were stepped
        ahead of it, which costs their time. 'immediate' ends the last step on the host, and raises what it failed with.
        """
        self._land()
        with torch.no_grad():
            self._mode.settle()

    def wait_for_weights(self) -> None:
        """Let the device wait for all weights that are on their way, before they are read outside of the forward.

        In mode 'immediate' the host waits until they are.
        """
        self._waits.wait_all()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, gradients stay with the model's parameters; they are of something else than a step."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Inside, gradients are taken although somebody has set the hooks of the parameters aside."""
        before, self._handles = self._handles, []
        for pair in self._pairs.values():
            if pair.master is not pair.parameter:
                self._hook(pair.parameter)
        try:
            yield
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles = before

    def synchronize(self) -> None:
        """Finish what is outstanding: masters, states and the model's weights are then those after the last step.

        In mode 'delayed' the next forward sees newer weights than it would have, so calls change the numbers.
        """
        self.settle()
        self._waits.wait_all()

    def refresh(self) -> None:
        """Take over the model's weights where they are not the masters' rounded values.

        Writes that PyTorch counts are found without this; those through `data` are not.
        """
        self.synchronize()
        for pair in self._pairs.values():
            pair.forget()
            pair.adopt()

    def close(self) -> None:
        """Wait for what is on its way and remove all hooks; the model trains on without this optimizer."""
        self.synchronize()
        for chunk in self._chunks:
            chunk.freed(self._lanes)
            chunk.rest()
        self._waits.detach()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for pair in self._pairs.values():
            unmark(pair.parameter)
        if self._memory is not None:
            self._memory.give_back([arena for chunk in self._chunks for arena in chunk.arenas])
            self._chunks, self._pairs, self._chunk_of = [], {}, {}
            self._mode.parts.chunks.clear()
            self.state.clear()
            self.param_groups = []

    # ------------------------------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """As that of AdamW over FP32 weights, which loads it. Weights that are BF16 on the device are in it too."""
        self.synchronize()
        saved = super().state_dict()
        masters = [parameter for group in self.param_groups for parameter in group["params"]]
        numbers = {id(master): number for number, master in enumerate(masters)}
        saved["state"] |= {numbers[id(master)]: entries for master, entries in self.saved_states().items()}
        return saved

    def saved_states(self) -> dict[Tensor, dict[str, Any]]:
        """The state of each master, with the FP32 weight of those that are not FP32 on the device."""
        self.synchronize()
        found = {master: dict(entries) for master, entries in self.state.items()}
        for pair in self._pairs.values():
            if pair.parameter.dtype is not torch.float32 and pair.master in found:
                pair.adopt()
                found[pair.master][MASTER] = pair.master.detach()
        return found

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of this class or of AdamW; FP32 weights in it replace those of the model."""
        self.synchronize()
        check_loaded(state_dict, [master for group in self.param_groups for master in group["params"]])
        super().load_state_dict(state_dict)
        self.adopt_states()

    @torch.no_grad()
    def adopt_states(self) -> None:
        """Take over what others have put into `state`, as `saved_states` gave it, and send the weights up.

        Raises:
            ConfigError: a state that does not fit. Steps are refused then, until one is loaded that does.
        """
        try:
            for pair in self._pairs.values():
                check_entries(self.state.get(pair.master, {}), pair.master)
        except ConfigError as error:
            self._mode.broken = error
            raise
        for chunk in self._chunks:
            for slot in chunk.slots:
                self._adopt_state(slot, slot.moments)
            chunk.kept = False  # a step that failed before changed another state
            self._mode.send(chunk)
        for pair in self._device_part.pairs:
            self._adopt_state(pair, None)
        self._device_part.write(self._device_part.pairs)
        self._waits.wait_all()
        self._mode.broken = None

    def __deepcopy__(self, _memo: dict[int, Any]) -> NoReturn:
        self._refuse_copy()

    def __reduce__(self) -> NoReturn:
        self._refuse_copy()

    def _refuse_copy(self) -> NoReturn:
        change = "Make one for the copied model, and load the state_dict of this one"
        raise ConfigError(explain("a copy of an OffloadedOptimizer", "one for each model, which it hooks", change))

    def _adopt_state(self, pair: Pair, moments: Sequence[Tensor] | None) -> None:
        """Take over what was loaded, into the chunk's memory if there is one."""
        state = self.state.get(pair.master, {})
        loaded = state.pop(MASTER, None)
        if loaded is None:
            pair.adopt()
        else:
            pair.master.copy_(loaded)
        if state:
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device="cpu").clone()
            for name, moment in zip(rule.MOMENTS, moments or (), strict=False):
                state[name] = moment.copy_(state[name])

    # ------------------------------------------------------------------------------------------ taking over

    def _take_over(self, members: Sequence[Member], device: torch.device) -> dict[int, nn.Parameter]:
        """Make chunks and hooks; gives what stands for each parameter in the groups."""
        settings = self.settings
        parts = schedule.chunks([m.parameter.numel() for m in members], limit_bytes=settings.chunk_bytes)
        narrow = all(m.parameter.dtype is not torch.float32 for m in members)
        per_value = 4 + 8 + 2 if narrow else 8 + 4  # the master, the moments and the gradient
        self._split = schedule.split(parts, free_bytes=settings.free_bytes, bytes_per_value=per_value)
        self.casts_on_host = settings.cast == "host"
        """Whether weights that are not FP32 are rounded before they are sent up."""
        if settings.cast == "auto" and settings.rates is not None:
            self.casts_on_host = schedule.cast_on_host(settings.rates)
        memory = Memory(
            crew=self._crew,
            wire=_WIRES[settings.wire],
            pin=device.type != "cpu",
            undo=settings.undo,
            cast_on_host=self.casts_on_host,
            two_gradients=settings.mode == "delayed",
            source=self._memory or HostMemory(),
        )
        for part in self._split.host:
            self._chunks.append(HostChunk(part.number, [members[index] for index in part.members], memory))
        self._device_part = DevicePart([members[index] for part in self._split.device for index in part.members])
        self._chunk_of = {id(slot.parameter): chunk for chunk in self._chunks for slot in chunk.slots}
        pairs: list[Pair] = [slot for chunk in self._chunks for slot in chunk.slots]
        for pair in [*pairs, *self._device_part.pairs]:
            pair.adopt()
            self._pairs[id(pair.parameter)] = pair
            mark_master(pair.parameter)
            if pair.master is not pair.parameter:
                self._hook(pair.parameter)
        return {key: pair.master for key, pair in self._pairs.items()}

    def _hook(self, parameter: nn.Parameter) -> None:
        me = weakref.ref(self)

        def arrived(parameter: Tensor) -> None:
            optimizer = me()
            if optimizer is not None:
                optimizer._arrived(parameter)

        trained = parameter.requires_grad
        parameter.requires_grad_(True)  # a frozen one cannot be hooked, but may be trained later
        self._handles.append(parameter.register_post_accumulate_grad_hook(arrived))
        parameter.requires_grad_(trained)

    def _make_mode(self, owner: Callable[[], Any], worker: Callable[[], Worker]) -> SyncStep:
        parts = Parts(
            owner=owner,
            chunks=self._chunks,
            device=self._device_part,
            lanes=self._lanes,
            waits=self._waits,
            worker=worker,
            undo=self.settings.undo,
            measure=self.settings.check_finite and self.settings.max_grad_norm is None,
            crew=self._crew,
            is_beside=not isinstance(self._lanes, DirectLanes),
        )
        if self.settings.mode == "delayed":
            return DelayedStep(parts, self.settings.delay_from)
        if self.settings.mode == "immediate":
            return ImmediateStep(parts, in_backward=self.settings.begin == "backward")
        return SpeculativeStep(parts) if self.settings.mode == "speculative" else SyncStep(parts)

    # ------------------------------------------------------------------------------------------ gradients

    def _arrived(self, parameter: Tensor) -> None:
        """Send a gradient down. Runs in backward, after the gradient has been added to `parameter.grad`."""
        if self._is_paused:
            return
        pair = self._pairs[id(parameter)]
        gradient = parameter.grad
        if gradient is None:
            passed = f"a parameter {list(parameter.shape)} whose gradient another optimizer has taken in backward"
            raise ConfigError(explain(passed, "one such optimizer for a parameter", "Call close() of the other one"))
        pair.check_gradient(gradient)
        parameter.grad = None
        if not isinstance(pair, Slot):
            self._device_part.arrived(pair, gradient)
            return
        self._note_pass()
        chunk = self._chunk_of[id(parameter)]
        self._mode.reopened(chunk)
        if pair.pending:
            with torch.no_grad():
                self._mode.land_chunk(chunk)
        pair.mark, pair.pending = self._lanes.down(pair.wire, gradient.detach()), True
        if self._waits.attached:
            self._waits.graded(parameter)
        chunk.coming.add(pair)
        if chunk.is_complete:
            self._mode.complete(chunk, last=self._passes >= self.settings.accumulation)

    def _note_pass(self) -> None:
        """At the first gradient of a backward; at the end of the window's last one, all are added up."""
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return
        self._task = task
        self._passes += 1
        for chunk in self._chunks:
            chunk.coming.clear()
        if self._passes >= self.settings.accumulation and self._mode.waits_for_all:
            Variable._execution_engine.queue_callback(self._land)

    @torch.no_grad()
    def _land(self) -> None:
        self._mode.land()

    def _norm(self) -> Tensor:
        """Of all gradients, as they stand in the masters."""
        if self.settings.max_grad_norm is not None:
            return total_norm(self._gradients(), self._crew.threads)
        on_device = [pair.master.grad for pair in self._device_part.pairs if pair.master.grad is not None]
        found = [norm for chunk in self._chunks for norm in chunk.norms()]
        return l2_norm_of(torch.cat([*found, *([l2_norm(on_device).to("cpu").view(1)] if on_device else [])]))

    def _gradients(self) -> list[Tensor]:
        found = [parameter.grad for group in self.param_groups for parameter in group["params"]]
        return [gradient for gradient in found if gradient is not None]


def _synchronize(optimizer: OffloadedOptimizer | None) -> None:
    if optimizer is not None:
        optimizer.synchronize()
