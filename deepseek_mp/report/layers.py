"""Which recipe each layer ran in, role by role, read off the decisions of a run: at its end, and how it changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from deepseek_mp.precision import Reason, Role
from deepseek_mp.precision.storage import STORAGE_KIND
from deepseek_mp.records import Run
from deepseek_mp.report.history import number

ROLES = tuple(role.value for role in Role)
EVENTS = (
    Reason.SATURATED, Reason.COMPARED, Reason.ADAPT_OFF, Reason.LOSS_FUSED, Reason.LOSS_NOT_FUSED,
    Reason.MEMORY_FITS, Reason.MEMORY_SAVED, Reason.MEMORY_LEFT,
)  # fmt: skip
"""They are written down among the decisions and change no recipe."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A decision as its line says it, with the last step that was done before it.

    Reasons and recipes are kept as text: a later release may know more of them. `role` is None for all roles.
    """

    step: int
    layer: str
    role: str | None
    old: str
    new: str
    reason: str
    detail: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class LayerHistory:
    """The choices of a run."""

    in_force: tuple[Choice, ...]
    """At the end, in the order of the layers; of roles that differ one choice each."""
    changes: tuple[Choice, ...]
    """Those that replaced another recipe while the run went on."""
    saturated: tuple[Choice, ...]
    """Tensors that outgrew their delayed scales."""
    compared: tuple[Choice, ...] = ()
    """Comparisons of the loss with that in FP32 after which live precision changed its budgets."""
    storage: tuple[Choice, ...] = ()
    """How weights are stored at the end, the last decision on each: `layer` names the parameter, `new` a format."""
    adapt_off: tuple[str, ...] = ()
    """Why live precision decided nothing, where it was to."""

    @property
    def budget_scale(self) -> float | None:
        """The share of its budgets that live precision spends at the end, where comparisons changed it."""
        return number(self.compared[-1].evidence.get("budget_scale")) if self.compared else None

    def recipes(self) -> dict[str, dict[str, str]]:
        """Layer -> role -> recipe, at the end."""
        found: dict[str, dict[str, str]] = {}
        for choice in self.in_force:
            roles = ROLES if choice.role is None else (choice.role,)
            found.setdefault(choice.layer, {}).update(dict.fromkeys(roles, choice.new))
        return found


def read_layers(run: Run) -> LayerHistory:
    """The choices in the decisions in force of a run; those about how weights are stored are apart.

    A decision of layers that the plan in force no longer has is not at its end, if the plan names its decisions.
    """
    choices = [_choice(line) for line in run.decisions if line.get("kind") != STORAGE_KIND]
    stored = [_choice(line) for line in run.decisions if line.get("kind") == STORAGE_KIND]
    lasting = [choice for choice in choices if choice.reason not in EVENTS]
    state: dict[str, dict[str, Choice]] = {}
    changes = []
    for choice in lasting:
        before = state.setdefault(choice.layer, {})
        roles = ROLES if choice.role is None else (choice.role,)
        olds = [before[role].new for role in roles if role in before and before[role].new != choice.new]
        if olds:
            changes.append(replace(choice, old=olds[0]))
        before |= {role: _after(before.get(role), choice) for role in roles}
    known = _planned(run.plan)
    return LayerHistory(
        in_force=tuple(
            choice for layer, roles in state.items() if known is None or layer in known for choice in _joined(roles)
        ),
        changes=tuple(changes),
        saturated=tuple(choice for choice in choices if choice.reason == Reason.SATURATED),
        compared=tuple(choice for choice in choices if choice.reason == Reason.COMPARED),
        storage=tuple({choice.layer: choice for choice in stored}.values()),
        adapt_off=tuple(dict.fromkeys(choice.detail for choice in choices if choice.reason == Reason.ADAPT_OFF)),
    )


def _choice(line: Mapping[str, Any]) -> Choice:
    role, evidence = line.get("role"), line.get("evidence")
    return Choice(
        step=line["step"],
        layer=str(line.get("layer", "")),
        role=str(role) if role else None,
        old=str(line.get("old", "")),
        new=str(line.get("new", "")),
        reason=str(line.get("reason", "")),
        detail=str(line.get("detail", "")),
        evidence=evidence if isinstance(evidence, dict) else {},
    )


def _after(before: Choice | None, choice: Choice) -> Choice:
    """What is in force after a choice: one that changes nothing, as when a run is resumed, keeps the first's step."""
    if before is None or before.new != choice.new:
        return choice
    if choice.reason == Reason.RESUMED:
        return before
    return replace(choice, step=before.step, old=before.old)


def _joined(roles: Mapping[str, Choice]) -> list[Choice]:
    """One choice for all roles if they agree, else one each."""
    apart = {replace(choice, role=None) for choice in roles.values()}
    if len(apart) == 1 and set(roles) == set(ROLES):
        return list(apart)
    return [replace(choice, role=role) for role, choice in roles.items()]


def _planned(plan: Mapping[str, Any] | None) -> set[str] | None:
    """The layers that the decisions of a stored plan name; None if it has none."""
    decisions = None if plan is None else plan.get("decisions")
    if not isinstance(decisions, list) or not decisions:
        return None
    return {str(entry.get("layer", "")) for entry in decisions if isinstance(entry, dict)}
