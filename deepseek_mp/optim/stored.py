"""`StoredOptimizer`: steps in FP32 on parameters that are FP32 or BF16 tensors, and writes BF16 ones without loss.

A step goes through batches of parameters. Each is opened (its value in FP32, with its compensation if it has one),
updated by the rule of the subclass, and written back: nothing for FP32, rounded stochastically, or split. So the rule
is written once, for FP32. Moments in 8-bit blocks are opened and closed too, one piece of one parameter at a time.

A step may be skipped on the device, without the host knowing, by the two tensors of PyTorch's fused optimizers:
`grad_scale` divides the gradients, and `found_inf` leaves everything as it is where it is 1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from deepseek_mp.errors import ConfigError, ShapeError, explain
from deepseek_mp.ops.pointer_table import PointerTable, sent
from deepseek_mp.ops.storage_marks import mark_storage, storage_of
from deepseek_mp.ops.stored import joined, random_bits, round_by_bits
from deepseek_mp.ops.updates import update_fate
from deepseek_mp.optim.states import Moments, StateFormat, close, convert, goes_in_blocks, opened, pieces
from deepseek_mp.precision.checks import find_member
from deepseek_mp.precision.storage import StorageFormat

STORAGE, STREAM, COMPENSATION = "storage", "stream", "compensation"
"""Keys of a parameter's state: its format by name, its stream of random bits, and what its values lack."""
BATCH_ELEMENTS = 1 << 24
"""Elements that are updated together: bounds the memory of the FP32 copies."""
SMALL = 1 << 14
"""Elements of a gradient that is copied rather than launched an operation for."""
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
NOT_HERE = ("amsgrad", "maximize", "differentiable")
"""Options of PyTorch's optimizers that make another rule than those here."""
_SHARDED = "torch.distributed."
"""Where DTensor is from, which has no memory of its own: kernels would be given no address."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Parameters of one group that are updated together, opened."""

    params: list[Tensor]
    states: list[dict[str, Any]]
    values: list[Tensor]
    """The parameters in FP32 (FP64): themselves, or copies."""
    grads: list[Tensor]
    """Their gradients likewise, unscaled; zeros where the step is skipped."""
    keep: Tensor | None
    """fp32 []: 0 where the step is skipped, else 1. None: it is not skipped."""
    start: int = 0
    """Place of the first element in its parameter: other than zero for a piece of one."""

    def advance(self) -> list[float] | None:
        """Count this step; gives the number of steps of each parameter, None where only the device knows."""
        steps = [state["step"] for state in self.states]
        if self.keep is None and all(step.is_cpu for step in steps):
            # A number would be made a tensor for each of them.
            torch._foreach_add_(steps, torch.ones((), dtype=steps[0].dtype, device="cpu"))
            return [step.item() for step in steps]
        device, index = self.params[0].device, self.params[0].get_device()
        for state, step in zip(self.states, steps, strict=True):
            if step.get_device() != index:
                state["step"] = step.to(device, non_blocking=True)
        steps = [state["step"] for state in self.states]
        # As a list: a single tensor would be read on the host as a number.
        torch._foreach_add_(steps, 1.0 if self.keep is None else [self.keep] * len(steps))
        return None

    def counts(self) -> Tensor:
        """On the device, the number of the step of each parameter, [n], once it was counted."""
        # All are on the host or all on the device: `advance` has seen to that.
        return sent(torch.stack([state["step"] for state in self.states]), self.params[0].device)

    def factor(self, value: float | Tensor) -> Any:
        """`value`, or 1 where the step is skipped; a number or a tensor, as foreach operations take both."""
        return value if self.keep is None else torch.where(self.keep > 0, value, 1.0)

    def amount(self, value: float | Tensor) -> Any:
        """`value`, or 0 where the step is skipped."""
        return value if self.keep is None else value * self.keep


class StoredOptimizer(Optimizer):
    """Base of the optimizers here; `_moments`, `_new_state` and `_update` are a subclass's rule."""

    _step_supports_amp_scaling = True
    own_options = ("states",)
    """Options of groups that loading leaves as they are; states are then converted to what they say."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer`.

        Args:
            params: parameters or groups of them; BF16 ones are written as their group's `storage` says.
            defaults: the options of a group. Each has besides those of the rule: `storage`, `states`, `seed` and
                `foreach`.
        """
        self.fates: dict[Tensor, Tensor] = {}
        self._watched: dict[int, float] = {}
        self.tables: dict[object, PointerTable] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch. `ConfigError` for a parameter or option that is not possible; nothing is added then."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
            self._check_options(group)
        except Exception:  # an option of another form fails as it may
            del self.param_groups[-1]
            raise
        for parameter in group["params"]:
            if parameter.dtype is torch.bfloat16:
                look_after(parameter, StorageFormat(group["storage"]))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """After unpickling, copying and loading. Copies of parameters have lost their marks."""
        super().__setstate__(state)
        self.fates, self._watched, self.tables = {}, {}, {}
        for group in self.param_groups:
            group.setdefault("states", StateFormat.FP32.value)
            for parameter in group["params"]:
                if parameter.dtype is torch.bfloat16 and storage_of(parameter) is None:
                    kept = self.state.get(parameter, {}).get(STORAGE, group["storage"])
                    look_after(parameter, StorageFormat(kept))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in PyTorch, but exact: states keep the dtypes they were saved in, and parameters get the storage that
        they had. Their values come from the model's own `load_state_dict`, before or after.

        `states` stays that of the groups here: moments that were saved in another form are converted by the next step.
        `ConfigError` for a state of PyTorch's with options that these optimizers do not have; nothing is loaded then.
        """
        for group in state_dict["param_groups"]:
            _check_rule(group, "a state")
        own = [{key: group[key] for key in self.own_options} for group in self.param_groups]
        seen: dict[str, Any] = {}
        last = self.register_load_state_dict_pre_hook(lambda _, final: seen.update(final))
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        for group, options in zip(self.param_groups, own, strict=True):
            group.update(options)
        for saved_group, group in zip(seen["param_groups"], self.param_groups, strict=True):
            for number, parameter in zip(saved_group["params"], group["params"], strict=True):
                if number in seen["state"]:
                    saved = seen["state"][number]
                    self.adopt(parameter, StorageFormat(saved.get(STORAGE, StorageFormat.FP32)))
                    self.state[parameter] = {key: _placed(value, parameter) for key, value in saved.items()}

    def adopt(self, parameter: Tensor, format: StorageFormat) -> None:
        """Give a parameter the dtype and mark of a storage whose values are loaded elsewhere.

        A value is rounded to nearest here: one that was saved in this storage is not changed by that.
        """
        if parameter.dtype in (torch.float32, torch.bfloat16) and self.storage(parameter) is not format:
            hold(parameter, parameter.detach().to(torch.bfloat16 if format.is_bf16 else torch.float32), format)

    def storage(self, parameter: Tensor) -> StorageFormat:
        """How the parameter is stored."""
        found = storage_of(parameter)
        return StorageFormat.FP32 if found is None else found

    def watch(self, parameters: Iterable[Tensor], *, noise_fraction: float = 1.0) -> None:
        """Measure what becomes of the next update of these, as `ops.updates.update_fate`; read it in `fates`."""
        self._watched |= {id(parameter): noise_fraction for parameter in parameters}

    def is_watched(self, parameter: Tensor) -> bool:
        """Whether its next update is measured."""
        return id(parameter) in self._watched

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the gradients of the parameters; a `closure` is called first and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, skip = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for group in self.param_groups:
            whole, in_blocks = self._ready(group)
            whole, in_blocks = self._run_kernels(group, whole, in_blocks, scale, skip)
            for params in _parts(group, whole):
                states = [self.state[parameter] for parameter in params]
                grads = [parameter.grad for parameter in params if parameter.grad is not None]
                self._step_batch(group, _opened(params, states, grads, scale, skip))
            for parameter in in_blocks:
                self._step_in_blocks(group, parameter, scale, skip)
        self._watched = {}
        return loss

    def _check_options(self, _group: Mapping[str, Any]) -> None:
        """`ConfigError` for an option of the rule that is out of its range."""

    def _moments(self, group: Mapping[str, Any]) -> Moments:
        """What the rule keeps of each value of a parameter and 8-bit blocks can hold, with the type of their codes."""
        raise NotImplementedError

    def _new_state(self, _parameter: Tensor, _group: Mapping[str, Any]) -> dict[str, Any]:
        """What the rule keeps of a parameter besides its moments, before its first step."""
        return {}

    def _run_kernels(
        self,
        _group: Mapping[str, Any],
        whole: list[Tensor],
        in_blocks: list[Tensor],
        _scale: Tensor | None,
        _skip: Tensor | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Step parameters by kernels; gives those of both lists that there is none for."""
        return whole, in_blocks

    def is_fusable(self, parameter: Tensor) -> bool:
        """Whether a kernel can step it: it has a gradient, and nothing is measured."""
        return parameter.grad is not None and not self.is_watched(parameter)

    def _update(self, group: Mapping[str, Any], batch: Batch) -> None:
        """Advance the states and the values of a batch in place."""
        raise NotImplementedError

    def _ready(self, group: Mapping[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters with gradients, their states made: those whose moments are whole, and those in blocks."""
        moments = self._moments(group)
        whole: list[Tensor] = []
        blocks: list[Tensor] = []
        for parameter in group["params"]:
            grad = parameter.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                passed = f"a gradient of layout {grad.layout}"
                raise ConfigError(explain(passed, "dense gradients", "Build the embedding with sparse=False"))
            if grad.shape != parameter.shape or grad.device != parameter.device:
                passed = f"a gradient {list(grad.shape)} on {grad.device} for a parameter"
                passed = f"{passed} {list(parameter.shape)} on {parameter.device}"
                change = "Call zero_grad() after a parameter is moved or changed, and before the next backward"
                raise ShapeError(explain(passed, "one of the parameter's shape on its device", change))
            (blocks if moments and goes_in_blocks(parameter, group) else whole).append(parameter)
        for params in (whole, blocks):
            for parameter in params:
                self._make_ready(parameter, group, moments, in_blocks=params is blocks)
        return whole, blocks

    def _step_batch(self, group: Mapping[str, Any], batch: Batch) -> None:
        before = self._before(batch)
        self._update(group, batch)
        self._measure(batch, before)
        self._write(group, batch)

    def _step_in_blocks(
        self, group: Mapping[str, Any], parameter: Tensor, scale: Tensor | None, skip: Tensor | None
    ) -> None:
        """Step a parameter whose moments are in blocks, piece by piece: there are never more of them in FP32."""
        state, moments, grad = self.state[parameter], self._moments(group), parameter.grad
        assert grad is not None, "only parameters with a gradient are stepped"
        whole = self.is_watched(parameter) or not (parameter.is_contiguous() and grad.is_contiguous())
        step = state["step"]
        for start, stop in [(0, parameter.numel())] if whole else pieces(parameter):
            held = opened(state, moments, start, stop)
            if whole:
                of, of_grad, about = parameter, grad, state
                held = {name: value.view(parameter.shape) for name, value in held.items()}
            else:
                of, of_grad, about = _cut(parameter, start, stop), _cut(grad, start, stop), _piece(state, start, stop)
            piece = {**about, **held, "step": state["step"].clone()}
            batch = _opened([of], [piece], [of_grad], scale, skip, start=start)
            self._step_batch(group, batch)
            step = piece["step"]
            close(state, held, moments, start=start, step=step_number(step), keep=batch.keep)
        state["step"] = step

    def _make_ready(self, parameter: Tensor, group: Mapping[str, Any], moments: Moments, *, in_blocks: bool) -> None:
        """Make the state of a parameter where it is missing, and bring it into its form."""
        state: dict[str, Any] = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), device="cpu")
            state |= self._new_state(parameter, group)
        convert(state, parameter, moments, in_blocks=in_blocks)
        self._follow_dtype(parameter, group)

    def _follow_dtype(self, parameter: Tensor, group: Mapping[str, Any]) -> None:
        """See that a parameter whose model was cast, by `model.bfloat16()` say, is written as what it is now."""
        is_bf16, is_described = parameter.dtype is torch.bfloat16, STORAGE in self.state[parameter]
        if is_bf16 and storage_of(parameter) is None:
            look_after(parameter, StorageFormat(group["storage"]))
        if is_bf16 is not is_described:
            self.describe(parameter, self.storage(parameter), None)

    def describe(self, parameter: Tensor, format: StorageFormat, compensation: Tensor | None) -> None:
        """Write into the state how the parameter is stored; a missing compensation is zero."""
        state = self.state[parameter]
        for key in (STORAGE, COMPENSATION):
            state.pop(key, None)
        if format.is_bf16:
            state[STORAGE] = format.value
        if format is StorageFormat.BF16_KAHAN:
            state[COMPENSATION] = torch.zeros_like(parameter) if compensation is None else compensation
        if format is StorageFormat.BF16_SR and STREAM not in state:
            state[STREAM] = self._free_stream()

    def _free_stream(self) -> int:
        taken = [state[STREAM] for state in self.state.values() if STREAM in state]
        return max(taken, default=-1) + 1

    def _before(self, batch: Batch) -> dict[int, Tensor]:
        return {i: batch.values[i].clone() for i, p in enumerate(batch.params) if id(p) in self._watched}

    def _measure(self, batch: Batch, before: Mapping[int, Tensor]) -> None:
        for index, value in before.items():
            parameter = batch.params[index]
            change = batch.values[index] - value
            share = self._watched[id(parameter)]
            self.fates[parameter] = update_fate(value.float(), change.float(), noise_fraction=share)

    def _write(self, group: Mapping[str, Any], batch: Batch) -> None:
        """Put the new values of BF16 parameters back."""
        by_format: dict[str, list[int]] = defaultdict(list)
        for index, (parameter, state) in enumerate(zip(batch.params, batch.states, strict=True)):
            if parameter.dtype is torch.bfloat16:
                by_format[state[STORAGE]].append(index)
        if rounded := by_format[StorageFormat.BF16_SR]:
            self._round(group["seed"], batch, rounded)
        for index in by_format[StorageFormat.BF16_KAHAN]:
            _write_split(batch, index)

    def _round(self, seed: int, batch: Batch, indices: Sequence[int]) -> None:
        """Stochastically. A skipped step has changed no value, and what BF16 holds is not rounded."""
        values = [batch.values[index] for index in indices]
        states = [batch.states[index] for index in indices]
        steps = [step_number(state["step"]) for state in states]
        sizes, streams = [value.numel() for value in values], [state[STREAM] for state in states]
        drawn = random_bits(sizes, streams, steps, seed=seed, start=batch.start, device=values[0].device)
        for index, value, bits in zip(indices, values, drawn, strict=True):
            batch.params[index].copy_(round_by_bits(value, bits))


def _parts(group: Mapping[str, Any], params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters by device and precision, in parts of bounded size."""
    kinds: dict[object, list[Tensor]] = defaultdict(list)
    for parameter in params:
        kinds[parameter.device, parameter.dtype is torch.float64].append(parameter)
    for alike in kinds.values():
        part: list[Tensor] = []
        size = 0
        for parameter in alike:
            if part and (size + parameter.numel() > BATCH_ELEMENTS or not group["foreach"]):
                yield part
                part, size = [], 0
            part.append(parameter)
            size += parameter.numel()
        if part:
            yield part


def _opened(
    params: list[Tensor],
    states: list[dict[str, Any]],
    grads: Sequence[Tensor],
    scale: Tensor | None,
    skip: Tensor | None,
    *,
    start: int = 0,
) -> Batch:
    values = [_value(parameter, state) for parameter, state in zip(params, states, strict=True)]
    found = [_like(grad, value) for grad, value in zip(grads, values, strict=True)]
    device = params[0].device
    keep = None
    if scale is not None:
        found = list(torch._foreach_mul(found, scale.to(device, non_blocking=True).reciprocal()))
    if skip is not None:
        keep = 1 - skip.to(device, torch.float32, non_blocking=True).reshape(())
        found = gated(found, keep)
    return Batch(params=params, states=states, values=values, grads=found, keep=keep, start=start)


def gated(grads: Sequence[Tensor], keep: Tensor) -> list[Tensor]:
    """The gradients, or zeros where `keep` [] is 0: small ones in one operation, since the host launches each."""
    small: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for grad in grads:
        if _is_small(grad):
            small[grad.dtype].append(grad)
    whole_of = {}
    for dtype, some in small.items():
        whole = torch.where(keep > 0, torch.cat([grad.reshape(-1) for grad in some]), 0.0)
        whole_of[dtype] = iter(whole.split([grad.numel() for grad in some]))
    return [
        next(whole_of[grad.dtype]).view(grad.shape) if _is_small(grad) else torch.where(keep > 0, grad, 0.0)
        for grad in grads
    ]


def _is_small(grad: Tensor) -> bool:
    # What is not contiguous would come back in another order than its parameter, which foreach operations dislike.
    return grad.numel() <= SMALL and grad.is_contiguous()


def _piece(state: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """The part of a state that is about a piece of the parameter, but for its moments."""
    about = {key: state[key] for key in (STORAGE, STREAM) if key in state}
    return about | ({COMPENSATION: _cut(state[COMPENSATION], start, stop)} if COMPENSATION in state else {})


def _cut(x: Tensor, start: int, stop: int) -> Tensor:
    return x.detach().view(-1)[start:stop]


def _write_split(batch: Batch, index: int) -> None:
    parameter, value = batch.params[index], batch.values[index]
    compensation = batch.states[index][COMPENSATION]
    new = value.bfloat16()
    lacking = (value - new).bfloat16()
    if batch.keep is not None:  # the sum would be the same, but not always its two parts
        new = torch.where(batch.keep > 0, new, parameter)
        lacking = torch.where(batch.keep > 0, lacking, compensation)
    parameter.copy_(new)
    compensation.copy_(lacking)


def step_number(step: Tensor) -> int | Tensor:
    """A step counter as `random_bits` takes it: nothing waits for a device."""
    return int(step.item()) if step.device.type == "cpu" else step.long()


def look_after(parameter: Tensor, format: StorageFormat) -> None:
    """Mark a parameter, and let a BF16 one have FP32 gradients, which add up over micro-batches without loss."""
    mark_storage(parameter, format)
    if parameter.grad is None:
        parameter.grad_dtype = torch.float32 if format.is_bf16 else parameter.dtype


def hold(parameter: Tensor, value: Tensor, format: StorageFormat) -> None:
    """Give a parameter the memory of a value in its new format."""
    gradient, parameter.grad = parameter.grad, None
    parameter.data = value
    look_after(parameter, format)
    if gradient is not None:
        parameter.grad = gradient.float()


def _value(parameter: Tensor, state: Mapping[str, Any]) -> Tensor:
    """The parameter's value as exact as it is kept: itself, or an FP32 copy."""
    if parameter.dtype is not torch.bfloat16:
        return parameter
    return joined(parameter, state[COMPENSATION]) if COMPENSATION in state else parameter.float()


def _placed(value: Any, parameter: Tensor) -> Any:
    """A copy of a saved value, as its parameter lies in memory; a counter on the host stays there."""
    if not isinstance(value, Tensor):
        return value
    if value.shape == parameter.shape and value.dim():
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return value.clone() if value.device.type == "cpu" else value.to(parameter.device, copy=True)


def _like(grad: Tensor, value: Tensor) -> Tensor:
    return grad if grad.dtype is value.dtype else grad.to(value.dtype)


def _check_rule(group: Mapping[str, Any], what: str) -> None:
    """`ConfigError` for what would make another rule, and be passed over here."""
    if wanted := [name for name in NOT_HERE if group.get(name)]:
        passed = f"{what} with {' and '.join(wanted)}"
        raise ConfigError(explain(passed, "the rule without", "Leave them out, or train with torch.optim's"))


def _check_group(group: Mapping[str, Any]) -> None:
    _check_rule(group, "a group")
    for parameter in group["params"]:
        if parameter.dtype not in _DTYPES:
            passed = f"a parameter {list(parameter.shape)} of {parameter.dtype}"
            change = "Convert the model with .float() or .bfloat16()"
            raise ConfigError(explain(passed, ", ".join(map(str, _DTYPES)), change))
    allowed = [format.value for format in StorageFormat if format.is_bf16]
    if group["storage"] not in allowed:
        change = "Name how BF16 parameters are written; FP32 ones are converted by set_storage"
        raise ConfigError(explain(f"storage={group['storage']!r}", ", ".join(allowed), change))
    if find_member("format of states", StateFormat, group["states"]) is StateFormat.EIGHT_BIT:
        for parameter in group["params"]:
            if type(parameter).__module__.startswith(_SHARDED):
                passed = f"states='8bit' for a sharded parameter {list(parameter.shape)}"
                raise ConfigError(explain(passed, "plain tensors, or states='fp32'", "Pass states='fp32'"))
    if not isinstance(group["seed"], int) or not 0 <= group["seed"] < 1 << 64:
        raise ConfigError(explain(f"seed={group['seed']!r}", "a whole number of 64 bits", "Pass for example 0"))
