"""`WeightStorage`: a callback that chooses how each weight is stored, by what becomes of its updates in training."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.nn.parameter_kinds import ParameterKind, parameter_kinds
from deepseek_mp.ops.updates import FATE_FIELDS
from deepseek_mp.optim import StoredOptimizer, set_storage
from deepseek_mp.precision import PrecisionPlan
from deepseek_mp.precision.checks import find
from deepseek_mp.precision.storage import (
    STORAGE_POLICIES,
    StorageDecision,
    StorageFormat,
    StorageLimits,
    StorageReason,
    StorageState,
    UpdateFate,
    decide_storage,
)
from deepseek_mp.trainer.callbacks import Callback
from deepseek_mp.trainer.result import FitResult, StepFacts

if TYPE_CHECKING:
    from deepseek_mp.trainer.loop import MixedPrecisionTrainer

log = logging.getLogger("deepseek_mp")


class WeightStorage(Callback):
    """Measures what becomes of every weight's update in some steps, and stores the weight accordingly.

    Example:
        storage = WeightStorage(every=200)
        trainer = MixedPrecisionTrainer(model, precision_mode="bf16", optimizer=deepseek_mp.optim.AdamW,
                                        callbacks=[storage])

    Args:
        every: applied steps from one measurement to the next. A measurement waits for the device.
        policy: 'auto' or 'small_updates', see `precision.storage.decide_storage`.
        limits: what the policy compares with.
        noise_fraction: share of an update's energy that is noise of the batch, see `ops.updates.update_fate`.

    Raises:
        ConfigError: an argument out of its range; when training starts, an optimizer that is none of `optim`.
    """

    def __init__(
        self,
        *,
        every: int = 100,
        policy: str = "auto",
        limits: StorageLimits = StorageLimits(),  # noqa: B008 - a frozen value
        noise_fraction: float = 1.0,
    ) -> None:
        find("policy", STORAGE_POLICIES, policy, ConfigError)
        if not isinstance(limits, StorageLimits):
            raise ConfigError(explain(f"limits={limits!r}", "a StorageLimits", "Pass StorageLimits(...)"))
        whole = isinstance(every, int) and not isinstance(every, bool)
        if not (whole and every >= 1 and isinstance(noise_fraction, int | float) and 0 < noise_fraction <= 1):
            passed = f"every={every!r}, noise_fraction={noise_fraction!r}"
            allowed = "every a whole number from 1, noise_fraction above 0 and at most 1"
            raise ConfigError(explain(passed, allowed, "Leave them out for the defaults"))
        self.every, self.policy, self.limits, self.noise_fraction = every, policy, limits, noise_fraction
        self.decisions: list[StorageDecision] = []
        """Those that changed a storage, in order."""
        self.latest: dict[str, StorageDecision] = {}
        """The last decision of each parameter, by name."""
        self._states: dict[str, StorageState] = {}
        self._is_waiting = False

    def recorded_settings(self) -> dict[str, Any]:
        limits = asdict(self.limits)
        return {"every": self.every, "policy": self.policy, "noise_fraction": self.noise_fraction, "limits": limits}

    def on_fit_start(self, trainer: MixedPrecisionTrainer) -> None:
        _stored_optimizer(trainer)
        if self._is_waiting:  # the run was saved before the step that it would have measured
            self._watch(trainer)

    def on_step(self, trainer: MixedPrecisionTrainer, facts: StepFacts) -> None:
        """Decide on what was measured in this step, or have the next one measured."""
        optimizer = _stored_optimizer(trainer)
        fates, optimizer.fates = optimizer.fates, {}
        if self._is_waiting and facts.status == "applied":
            self._is_waiting = False
            self._decide(trainer, optimizer, fates)
        elif self._is_waiting or trainer.steps_applied % self.every == 0:  # a step that was skipped is measured again
            self._watch(trainer)

    def on_fit_end(self, trainer: MixedPrecisionTrainer, _result: FitResult) -> None:
        log.info("weights are stored as %s", _counted(trainer))

    def _watch(self, trainer: MixedPrecisionTrainer) -> None:
        self._is_waiting = True
        parameters = parameter_kinds(trainer.model, trainer.plan)
        stored = [parameter for parameter in parameters if parameter.dtype in (torch.float32, torch.bfloat16)]
        _stored_optimizer(trainer).watch(stored, noise_fraction=self.noise_fraction)

    def _decide(self, trainer: MixedPrecisionTrainer, optimizer: StoredOptimizer, fates: dict[Tensor, Tensor]) -> None:
        kinds = parameter_kinds(trainer.model, trainer.plan)
        known = [parameter for parameter in fates if parameter in kinds]
        if not known:
            return
        made: list[StorageDecision] = []
        numbers = torch.stack([fates[parameter].to(trainer.device) for parameter in known]).tolist()
        for parameter, line in zip(known, numbers, strict=True):
            about = kinds[parameter]
            state = self._state(about.name, optimizer.storage(parameter))
            decision = decide_storage(about.name, _fate(line, about), state, limits=self.limits, policy=self.policy)
            self._states[about.name] = decision.state
            self.latest[about.name] = decision
            if decision.changes:
                set_storage(optimizer, parameter, decision.new)
                made.append(decision)
        self.decisions += made
        trainer.recorder.decided(made)

    def _state(self, name: str, format: StorageFormat) -> StorageState:
        """What the last decision left; somebody else may have changed the storage since."""
        state = self._states.get(name)
        return state if state is not None and state.format is format else StorageState(format=format)

    def state_dict(self) -> dict[str, Any]:
        """How long a smaller format has been good enough, by parameter, and the decisions so far."""
        return {
            "waiting": self._is_waiting,
            "latest": [decision.to_json() for decision in self.latest.values()],
            "decisions": [decision.to_json() for decision in self.decisions],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._is_waiting = state["waiting"]
        self.latest = {line["layer"]: StorageDecision.from_json(line) for line in state["latest"]}
        self.decisions = [StorageDecision.from_json(line) for line in state["decisions"]]
        self._states = {name: decision.state for name, decision in self.latest.items()}


def change_precision(trainer: MixedPrecisionTrainer, plan: PrecisionPlan) -> None:
    """`trainer.change_plan`, which weights in BF16 do not stand in the way of.

    Those that a layer will no longer read in BF16 go to FP32, where nothing is lost.
    """
    if isinstance(trainer.optimizer, StoredOptimizer):
        trainer.recorder.decided(_widened(trainer.optimizer, parameter_kinds(trainer.model, plan)))
    trainer.change_plan(plan)


def _widened(optimizer: StoredOptimizer, kinds: Mapping[Tensor, ParameterKind]) -> list[StorageDecision]:
    """Store in FP32 what is in BF16 and not read so."""
    made = []
    for parameter, about in kinds.items():
        if about.read_as != "bf16" and parameter.dtype == torch.bfloat16 and parameter.requires_grad:
            old, new = optimizer.storage(parameter), StorageFormat.FP32
            set_storage(optimizer, parameter, new)
            state, why = StorageState(format=new), StorageReason.READ_IN_FP32
            made.append(StorageDecision(layer=about.name, old=old, new=new, reason=why, state=state))
    return made


def _fate(line: list[float], about: ParameterKind) -> UpdateFate:
    measured = dict(zip(FATE_FIELDS, line, strict=True))
    assert measured.keys() | {"kind", "read_as"} == {f.name for f in fields(UpdateFate)}
    return UpdateFate(kind=about.kind, read_as=about.read_as, **measured)


def _stored_optimizer(trainer: MixedPrecisionTrainer) -> StoredOptimizer:
    if isinstance(trainer.optimizer, StoredOptimizer):
        return trainer.optimizer
    passed = f"WeightStorage with the optimizer {type(trainer.optimizer).__name__}"
    change = "Pass for example optimizer=deepseek_mp.optim.AdamW"
    raise ConfigError(explain(passed, "the optimizers of deepseek_mp.optim, which can write BF16 weights", change))


def _counted(trainer: MixedPrecisionTrainer) -> str:
    counts = dict.fromkeys(StorageFormat, 0)
    for parameter in trainer.model.parameters():
        counts[_stored_optimizer(trainer).storage(parameter)] += parameter.numel()
    total = sum(counts.values())
    return ", ".join(f"{count / total:.0%} {format}" for format, count in counts.items() if count)
