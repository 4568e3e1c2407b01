"""The format that a layer's weight is stored in, decided from what became of its updates.

An optimizer adds a small update to a large weight. Rounded to the nearest BF16 value, which has 8 bits, most of such
sums are the weight again. So a weight in BF16 is written in one of two other ways: rounded stochastically, which adds
noise and loses nothing on average, or with what the rounding left over kept in a second BF16 tensor (Kahan's
compensation). Rounding to nearest is not among the formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.precision.checks import find, find_member, read_object, require
from deepseek_mp.precision.evidence import freeze, thaw


class StorageFormat(StrEnum):
    """How a trained weight is kept between steps; from the most exact to the smallest."""

    FP32 = "fp32"
    """4 bytes for each value."""
    BF16_KAHAN = "bf16_kahan"
    """2 bytes, and 2 in the optimizer for what they lack: together about 16 bits of precision."""
    BF16_SR = "bf16_sr"
    """2 bytes, rounded up or down by chance, so that the mean is right."""

    @property
    def is_bf16(self) -> bool:
        """Whether the parameter is a BF16 tensor."""
        return self is not StorageFormat.FP32

    @property
    def weight_bytes(self) -> int:
        """Bytes for each value, the compensation included."""
        return 2 if self is StorageFormat.BF16_SR else 4


STORAGE_KIND = "storage"
"""`kind` of these decisions in the records of a run; those about recipes have none."""
_FROM_EXACT = tuple(StorageFormat)


class StorageReason(StrEnum):
    """Why a weight is stored as it is."""

    NOISE_SMALL = "noise_small"
    """The noise of stochastic rounding is small beside the noise that the updates have anyway."""
    NOISE_LARGE = "noise_large"
    """The noise of stochastic rounding would drown the updates; compensation keeps them."""
    UPDATES_LOST = "updates_lost"
    """The updates are too small even for compensated BF16."""
    SMALL_UPDATES = "small_updates"
    """The weight hardly moves, and the policy lets such layers be stored lower."""
    LARGE_UPDATES = "large_updates"
    """The weight moves too much for a policy that lowers layers that hardly move."""
    KIND_KEPT = "kind_kept"
    """Norms, biases and embeddings stay in FP32."""
    READ_IN_FP32 = "read_in_fp32"
    """The layer multiplies its weight in a wider format than BF16."""
    NOT_MEASURED = "not_measured"
    """The step did not change the weight, or not by finite numbers: it stays as it is stored."""
    WAITING = "waiting"
    """A smaller format is good enough, but has not been for as many decisions in a row as the limits ask."""


@dataclass(frozen=True, kw_only=True)
class UpdateFate:
    """What became of a weight's updates, as plain numbers; `ops.updates.update_fate` measures them.

    NaN where there was nothing to measure.
    """

    lost: float
    """Share of the updates other than zero that rounding to the nearest BF16 value would lose."""
    edq: float
    """<effective update, update> / |update|^2 for rounding to nearest (Collage, arXiv 2405.03637); 1: nothing lost."""
    edq_sr: float
    """The same for one stochastic rounding."""
    edq_kahan: float
    """The same for BF16 with compensation."""
    psi: float
    """Variance that stochastic rounding adds, over the variance of the updates' own noise."""
    ratio: float
    """|update| / |weight|."""
    kind: str = "weight"
    """What the tensor is: 'weight', 'norm', 'bias' or 'embedding'."""
    read_as: str = "bf16"
    """The format of the region around the layer that reads it: 'bf16' also for layers in FP8."""


@dataclass(frozen=True, kw_only=True)
class StorageLimits:
    """What a policy compares measurements with."""

    psi: float = 20.0
    """Stochastic rounding is allowed below this. Its noise is white and new in each step, so that it averages out like
    the noise of batches; a multiple of that noise is harmless while the rate is high, and is what stays of the weight's
    motion when the rate has fallen, since it shrinks with the update and not with its square."""
    edq_error: float = 0.05
    """How far the effective update may be from the update, as |EDQ - 1|: 5 % is the error that a learning rate is
    known with at best."""
    small_ratio: float = 1e-3
    """Below this |update| / |weight| a layer hardly moves, for the policy 'small_updates': healthy training has about
    1e-3."""
    in_a_row: int = 3
    """A smaller format is taken when so many decisions in a row would take it. A more exact one is taken at once: what
    a wider format holds it holds exactly, and what a narrow one has lost does not come back."""
    kept_kinds: tuple[str, ...] = ("norm", "bias", "embedding")
    """They stay in FP32: the first two are small, and rows of an embedding are updated seldom."""

    def __post_init__(self) -> None:
        for name in ("psi", "edq_error", "small_ratio"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ConfigError(
                    explain(f"{name}={value!r}", "a finite number above 0", "Leave it out for the default")
                )
        if not isinstance(self.in_a_row, int) or self.in_a_row < 1:
            raise ConfigError(
                explain(f"in_a_row={self.in_a_row!r}", "a whole number from 1", "Pass 1 to take it at once")
            )


@dataclass(frozen=True, kw_only=True)
class StorageState:
    """The storage of a weight, and how long a smaller one has been good enough."""

    format: StorageFormat = StorageFormat.FP32
    favoured: StorageFormat | None = None
    """The smallest format that all decisions in a row would take; None: the last one would not take a smaller one."""
    in_a_row: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", find_member("storage format", StorageFormat, self.format))


@dataclass(frozen=True, kw_only=True)
class StorageDecision:
    """The storage of one weight: what it was, what it is, and why.

    `evidence` holds what the reason rests on: JSON values, read-only. `state` is what the next decision starts from.
    """

    layer: str
    old: StorageFormat
    new: StorageFormat
    reason: StorageReason
    state: StorageState
    detail: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("layer", "detail"):
            require(f"storage decision field {name}", getattr(self, name), str, "Pass a name or text")
        for name in ("old", "new"):
            object.__setattr__(self, name, find_member("storage format", StorageFormat, getattr(self, name)))
        object.__setattr__(self, "reason", find_member("reason", StorageReason, self.reason))
        object.__setattr__(self, "evidence", freeze(self.evidence))

    @property
    def changes(self) -> bool:
        """Whether the weight is to be stored in another format than before."""
        return self.old is not self.new

    def to_json(self) -> dict[str, Any]:
        favoured = None if self.state.favoured is None else self.state.favoured.value
        state = {"format": self.state.format.value, "favoured": favoured, "in_a_row": self.state.in_a_row}
        return {
            "layer": self.layer,
            "old": self.old.value,
            "new": self.new.value,
            "reason": self.reason.value,
            "state": state,
            "detail": self.detail,
            "evidence": thaw(self.evidence),
        }

    @classmethod
    def from_json(cls, data: object) -> StorageDecision:
        """The decision that `to_json` wrote; `PlanError` when `data` is anything else."""
        values = dict(read_object("a storage decision", data, [f.name for f in fields(cls)]))
        state = dict(read_object("a storage state", values["state"], [f.name for f in fields(StorageState)]))
        if state["favoured"] is not None:
            state["favoured"] = find_member("storage format", StorageFormat, state["favoured"])
        return cls(**{**values, "state": StorageState(**state)})

    def __str__(self) -> str:
        why = f": {self.detail}" if self.detail else ""
        return f"{self.layer or '(model)'} {self.old} -> {self.new} ({self.reason.value}{why})"


Choice = tuple[StorageFormat, StorageReason, str]
"""The smallest format that is good enough, why, and in words."""


def decide_storage(
    layer: str,
    measured: UpdateFate,
    state: StorageState = StorageState(),
    *,
    limits: StorageLimits = StorageLimits(),
    policy: str = "auto",
) -> StorageDecision:
    """The storage of a weight after one more measurement.

    Args:
        layer: name of the parameter, for the record.
        measured: what became of its updates since the last decision.
        state: `StorageDecision.state` of the last one, or the storage that the weight has.
        policy: 'auto' takes the smallest format whose noise and losses are within the limits; 'small_updates' lowers
            layers that hardly move, as far as they lose nothing.

    Raises:
        ConfigError: there is no policy of that name.
    """
    choose = find("policy", STORAGE_POLICIES, policy, ConfigError)
    choice = _kept(measured, limits)
    if choice is None and _is_unknown(measured):
        choice = state.format, StorageReason.NOT_MEASURED, "no finite update was seen"
    wanted, reason, detail = choice or choose(measured, limits)
    now = _next(state, wanted, limits)
    if now.format is not wanted:
        detail = f"{wanted} would do ({now.in_a_row} of {limits.in_a_row} in a row): {detail}"
        reason = StorageReason.WAITING
    evidence = {f.name: getattr(measured, f.name) for f in fields(measured)}
    finite = {name: value for name, value in evidence.items() if isinstance(value, str) or math.isfinite(value)}
    return StorageDecision(
        layer=layer,
        old=state.format,
        new=now.format,
        reason=reason,
        state=now,
        detail=detail,
        evidence={**finite, "policy": policy},
    )


def _next(state: StorageState, wanted: StorageFormat, limits: StorageLimits) -> StorageState:
    """Up at once; down after enough decisions in a row, to the most exact of what they would take."""
    if _FROM_EXACT.index(wanted) <= _FROM_EXACT.index(state.format):
        return StorageState(format=wanted)
    favoured = wanted if state.favoured is None else min(wanted, state.favoured, key=_FROM_EXACT.index)
    in_a_row = state.in_a_row + 1
    if in_a_row >= limits.in_a_row:
        return StorageState(format=favoured)
    return StorageState(format=state.format, favoured=favoured, in_a_row=in_a_row)


def _kept(measured: UpdateFate, limits: StorageLimits) -> Choice | None:
    """What no policy lowers."""
    if measured.kind in limits.kept_kinds:
        return StorageFormat.FP32, StorageReason.KIND_KEPT, f"{measured.kind} parameters stay in fp32"
    if measured.read_as != "bf16":
        return StorageFormat.FP32, StorageReason.READ_IN_FP32, f"its layer runs in {measured.read_as}"
    return None


def _is_unknown(measured: UpdateFate) -> bool:
    """Whether the step did not move the weight: a rate of zero, a gradient of zero, or one that is not finite."""
    numbers = (measured.edq_sr, measured.edq_kahan, measured.psi, measured.ratio)
    return not all(math.isfinite(number) for number in numbers)


def _by_noise(measured: UpdateFate, limits: StorageLimits) -> Choice:
    """The policy 'auto'."""
    noise = f"psi {measured.psi:.3g}, limit {limits.psi:g}"
    if measured.psi < limits.psi and _whole(measured.edq_sr, limits):
        return StorageFormat.BF16_SR, StorageReason.NOISE_SMALL, noise
    if _whole(measured.edq_kahan, limits):
        if measured.psi < limits.psi:  # few values, so that the noise of one step does not average out over them
            noise = f"EDQ {measured.edq_sr:.3g} with stochastic rounding, further than {limits.edq_error:g} from 1"
        return StorageFormat.BF16_KAHAN, StorageReason.NOISE_LARGE, noise
    return _lost(measured, limits)


def _by_ratio(measured: UpdateFate, limits: StorageLimits) -> Choice:
    """The policy 'small_updates'."""
    moves = f"|update| / |weight| {measured.ratio:.3g}, limit {limits.small_ratio:g}"
    if measured.ratio >= limits.small_ratio:
        return StorageFormat.FP32, StorageReason.LARGE_UPDATES, moves
    for format, edq in ((StorageFormat.BF16_SR, measured.edq_sr), (StorageFormat.BF16_KAHAN, measured.edq_kahan)):
        if _whole(edq, limits):
            return format, StorageReason.SMALL_UPDATES, moves
    return _lost(measured, limits)


def _whole(edq: float, limits: StorageLimits) -> bool:
    return abs(edq - 1) <= limits.edq_error


def _lost(measured: UpdateFate, limits: StorageLimits) -> Choice:
    detail = f"EDQ {measured.edq_kahan:.3g} with compensation, further than {limits.edq_error:g} from 1"
    return StorageFormat.FP32, StorageReason.UPDATES_LOST, detail


Policy = Callable[[UpdateFate, StorageLimits], Choice]
STORAGE_POLICIES: Mapping[str, Policy] = MappingProxyType({"auto": _by_noise, "small_updates": _by_ratio})
"""Policies by name."""
