"""A trainer whose optimizer is on the host: what is checked beforehand, and what is done otherwise.

Gradients leave the model in backward and are summed by the optimizer's masters; scaling, clipping and skipping work on
these, so the trainer's own settings are in force and the optimizer's are not. The device waits for new weights at the
end of a step, since casts, averages and losses read weights outside of their modules.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.optim.offload import OffloadedOptimizer
from deepseek_mp.optim.offload.stepped import land
from deepseek_mp.trainer.config import TrainerConfig


def take_offloaded(optimizer: Optimizer, model: nn.Module, config: TrainerConfig) -> None:
    """Check an offloaded optimizer and give it the trainer's settings; any other is left alone.

    Raises:
        ConfigError: settings that contradict the trainer's, or a model that was moved since the optimizer was made.
    """
    if not isinstance(optimizer, OffloadedOptimizer):
        return
    _check(optimizer, config)
    steps = config.gradient_accumulation_steps
    # The scaler has seen all gradients before it steps.
    optimizer.settings = replace(optimizer.settings, accumulation=steps, check_finite=False)
    if not optimizer.waits_in_forward:
        model.register_state_dict_pre_hook(_Synchronize(optimizer))


def _check(optimizer: OffloadedOptimizer, config: TrainerConfig) -> None:
    settings = optimizer.settings
    for pair in optimizer.pairs:
        pair.check_place()
    if settings.max_grad_norm is not None:
        passed = f"an OffloadedOptimizer with max_grad_norm={settings.max_grad_norm}"
        change = "Pass max_grad_norm to the trainer, and leave it out of OffloadSettings"
        raise ConfigError(explain(passed, "clipping by the trainer, which also unscales and records", change))
    if settings.mode == "immediate":
        passed = "an OffloadedOptimizer in mode 'immediate'"
        allowed = "'sync', 'speculative' or 'delayed': the trainer sees all gradients before it steps"
        raise ConfigError(explain(passed, allowed, "Choose one of these, or step by hand"))
    if settings.accumulation not in (1, config.gradient_accumulation_steps):
        passed = f"an OffloadedOptimizer with accumulation={settings.accumulation}"
        allowed = f"gradient_accumulation_steps={config.gradient_accumulation_steps}, as the trainer has it"
        raise ConfigError(explain(passed, allowed, "Leave accumulation out of OffloadSettings"))
    if config.compile and optimizer.waits_in_forward:
        passed = f"an OffloadedOptimizer with model=, and compile={config.compile!r}"
        change = "Leave model= out: compiled code may not run the hooks that wait for weights"
        raise ConfigError(explain(passed, "compiled code without hooks of modules", change))


class _Synchronize:
    """A hook before the model's state is read. A copy of the model has no such optimizer: its hook does nothing."""

    def __init__(self, optimizer: OffloadedOptimizer | None) -> None:
        self._optimizer = (lambda: None) if optimizer is None else weakref.ref(optimizer)

    def __call__(self, *_: Any) -> None:
        synchronize(self._optimizer())

    def __reduce__(self) -> tuple[Any, ...]:
        return _Synchronize, (None,)


def synchronize(optimizer: Optimizer | None) -> None:
    """Finish what is outstanding, so that the model's weights are those after the last step."""
    if isinstance(optimizer, OffloadedOptimizer):
        optimizer.synchronize()


def between_steps(optimizer: Optimizer) -> None:
    """No gradient is kept or on its way, and the device waits for the weights that the last step has sent up."""
    if isinstance(optimizer, OffloadedOptimizer):
        optimizer.zero_grad()
        optimizer.wait_for_weights()


def paused(optimizer: Optimizer) -> AbstractContextManager[None]:
    """Inside, gradients stay with the model: they are of something else than a step."""
    return optimizer.paused() if isinstance(optimizer, OffloadedOptimizer) else nullcontext()


@contextmanager
def trial_steps(optimizer: Optimizer) -> Iterator[None]:
    """Around steps that are tried while the parameters' hooks are set aside; nothing is outstanding afterwards."""
    if not isinstance(optimizer, OffloadedOptimizer):
        yield
        return
    with optimizer.hooked():
        try:
            yield
        finally:
            optimizer.zero_grad()
            optimizer.synchronize()


def may_come_together(optimizer: Optimizer) -> bool:
    """Whether gradients may all come at the end of backward; to the host they go one by one while it runs."""
    return not isinstance(optimizer, OffloadedOptimizer)


def described(optimizer: Optimizer) -> dict[str, Any]:
    """For the records of a run: how the optimizer is offloaded, and in which memory; nothing if it is not."""
    if not isinstance(optimizer, OffloadedOptimizer):
        return {}
    split = optimizer.split
    memory = {"pinned": optimizer.pinned, "pinning_refused": optimizer.pinning_refused}
    share = {"share": split.fraction, "freed_bytes": split.freed_bytes}
    return {"offload": {**asdict(optimizer.settings), **share, **memory}}


def updates_are_seen(optimizer: Optimizer) -> bool:
    """Whether a step has changed the weights when it returns."""
    return not (isinstance(optimizer, OffloadedOptimizer) and optimizer.settings.mode == "delayed")


def masters(optimizer: Optimizer) -> dict[int, nn.Parameter]:
    """By the id of each master, the parameter of the model that it stands for; empty if nothing is offloaded."""
    if not isinstance(optimizer, OffloadedOptimizer):
        return {}
    return {id(pair.master): pair.parameter for pair in optimizer.pairs}


def without_masters(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    """The parameters of the model and of the optimizer, but for masters: these change while the model runs."""
    known = masters(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known]
    return list({id(p): p for p in (*model.parameters(), *trained)}.values())


def states(optimizer: Optimizer) -> dict[Tensor, dict[str, Any]]:
    """The state to be saved, by what the optimizer's groups hold."""
    return optimizer.saved_states() if isinstance(optimizer, OffloadedOptimizer) else dict(optimizer.state)


@torch.no_grad()
def states_loaded(optimizer: Optimizer) -> None:
    """Have the optimizer take over what was put into `state`."""
    if isinstance(optimizer, OffloadedOptimizer):
        optimizer.adopt_states()


def type_name(optimizer: Optimizer) -> str:
    """The rule that it steps by; the state of an offloaded AdamW is one of AdamW, and the other way round."""
    return "AdamW" if isinstance(optimizer, OffloadedOptimizer) else type(optimizer).__name__


def with_gradients(optimizer: Optimizer) -> list[Tensor]:
    """What the optimizer trains and has a gradient, all of which have arrived."""
    land(optimizer)
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def step_in_backward(parameters: Iterable[Tensor], optimizer: Optimizer) -> bool:
    """Whether a hook behind the accumulation of a gradient may change weights there; the offloaded one's does not."""
    ours = optimizer.hooks if isinstance(optimizer, OffloadedOptimizer) else lambda _: False
    return any(len(p._post_accumulate_grad_hooks or ()) > ours(p) for p in parameters)  # noqa: SLF001
