"""A decision: which recipe a layer runs in, and the reason that travels with the choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from deepseek_mp.precision.checks import find_member, read_object, require
from deepseek_mp.precision.evidence import freeze, thaw
from deepseek_mp.precision.roles import Role


class Reason(StrEnum):
    """Why a layer, an operation or a whole run has the precision it has."""

    REQUESTED = "requested"
    """The user named this precision for the run."""
    PINNED = "pinned"
    """A rule of the user's plan or a pin names this layer."""
    MEASURED_FASTEST = "measured_fastest"
    """It was the fastest of the formats timed on this device."""
    MEASURED_SLOWER = "measured_slower"
    """A lower format was timed and lost."""
    RECOMMENDED = "recommended"
    """The combination that suits this device; nothing was timed."""
    DEVICE_LACKS = "device_lacks"
    """The device cannot multiply in the lower format."""
    DOES_NOT_FIT = "does_not_fit"
    """The trial ran out of memory."""
    EMULATED = "emulated"
    """The device lacks the format and the user asked for emulation."""
    NO_KERNEL = "no_kernel"
    """The operation has no kernel in the lower format."""
    AUTOCAST_LIST = "autocast_list"
    """PyTorch's autocast runs this operation in FP32 for its range."""
    FOLLOWS_INPUT = "follows_input"
    """The operation runs in the format of its inputs, which autocast does not change."""
    OUTSIDE_REGION = "outside_region"
    """The model's code turns autocast off around the operation."""
    SHAPE = "shape"
    """The sizes do not meet the kernel's alignment."""
    OUTPUT_LAYER = "output_layer"
    """The model's last product: published FP8 recipes keep it higher."""
    NOT_CONTROLLABLE = "not_controllable"
    """The module's own forward is not what computes with its parameters."""
    SATURATED = "saturated"
    """Values of a tensor were cut: it grew faster than the past that its scale comes from."""
    ALLOCATED = "allocated"
    """The solver chose it: what it saves against what it costs of the loss and of the gradient's accuracy."""
    GUARDED = "guarded"
    """A guard raised it while training: a limit was broken, a bad number made, or its gradient or the loss jumped."""
    REGION_HARMS = "region_harms"
    """The format of the region around it takes too much of the budgets in this layer: it runs above the region."""
    COMPARED = "compared"
    """The loss was compared with that in FP32 on the same batch."""
    ADAPT_OFF = "adapt_off"
    """Live precision decides nothing in this run, for what the detail says."""
    LOSS_FUSED = "loss_fused"
    """Its output is computed in chunks inside of the loss, and never held whole."""
    LOSS_NOT_FUSED = "loss_not_fused"
    """The loss is computed of the model's output as ever, for what the detail says."""
    MEMORY_FITS = "memory_fits"
    """A training step fits into the memory asked for, with what the detail says."""
    MEMORY_SAVED = "memory_saved"
    """A way to save memory that was taken, since a step did not fit without."""
    MEMORY_LEFT = "memory_left"
    """A way to save memory that was not taken, for what the detail says."""
    RECOMPUTED = "recomputed"
    """What its backward needs is computed again there, to keep to a budget of memory."""
    NOT_RECOMPUTED = "not_recomputed"
    """What its backward needs is kept in spite of a budget of memory, for what the detail says."""
    RESUMED = "resumed"
    """Taken from the plan stored with a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One layer's precision: what it was, what it is, and why.

    `role` is None when the decision holds for all three products. `evidence` holds the numbers the
    reason rests on, with their unit in the key (`bf16_ms`): JSON values only, copied and read-only.
    `PlanError` for a value of another type.
    """

    layer: str
    old: str
    new: str
    reason: Reason
    role: Role | None = None
    detail: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for field_name in ("layer", "old", "new", "detail"):
            require(f"decision field {field_name}", getattr(self, field_name), str, "Pass a name or text")
        object.__setattr__(self, "reason", find_member("reason", Reason, self.reason))
        if self.role is not None:
            object.__setattr__(self, "role", find_member("role", Role, self.role))
        object.__setattr__(self, "evidence", freeze(self.evidence))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, by the name of the field."""
        return {
            "layer": self.layer,
            "role": None if self.role is None else self.role.value,
            "old": self.old,
            "new": self.new,
            "reason": self.reason.value,
            "detail": self.detail,
            "evidence": thaw(self.evidence),
        }

    @classmethod
    def from_json(cls, data: object) -> Decision:
        """The decision that `to_json` wrote; `PlanError` when `data` is anything else."""
        return cls(**read_object("a decision", data, [f.name for f in fields(cls)]))

    def __str__(self) -> str:
        why = f": {self.detail}" if self.detail else ""
        return f"{self.layer or '(model)'} {self.old} -> {self.new} ({self.reason.value}{why})"
