"""What the FP8 benchmark demands of each case, as data, and how the demands are judged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

REFERENCE = "bf16"
"""Whose losses the others must have, and what every case runs first."""
LOSS_TOLERANCE = 0.005
"""Largest relative difference of a step's loss, from the second step on."""
NOISE = 1.02
"""How much slower still counts as equal: what two runs of one contender differ by."""
RECIPES = ("block", "tensor", "delayed", "row")
EAGER = tuple(f"ours-{recipe}" for recipe in RECIPES)
COMPILED = tuple(f"{name}-compiled" for name in EAGER)
TORCHAO = "torchao-tensor-compiled"


@dataclass(frozen=True, kw_only=True)
class Target:
    """A demand on one of ours: against a peer by a ratio, or alone by a limit."""

    ours: tuple[str, ...]
    """The fastest of these that ran counts."""
    metric: str = "step_ms"
    peer: str = ""
    least: float = 0.0
    """The peer's number divided by ours must be at least this."""
    most: float = math.inf
    """Without a peer: our number must be at most this."""

    @property
    def what(self) -> str:
        name = self.ours[0] if len(self.ours) == 1 else f"fastest of {', '.join(self.ours)}"
        if not self.peer:
            return f"{self.metric} of {name} <= {self.most:g}"
        return f"{self.metric}: {self.peer} / {name} >= {self.least:.3g}"


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A case's contenders and demands. `contenders` run unless others are asked for; `more` is the rest."""

    contenders: tuple[str, ...]
    more: tuple[str, ...] = ()
    targets: tuple[Target, ...] = ()


_DECODER = (REFERENCE, "bf16-compiled", TORCHAO, "ours-block", "ours-block-compiled", "ours-delayed",
            "ours-delayed-compiled")  # fmt: skip
_DECODER_MORE = ("torchao-row-compiled", "ours-tensor", "ours-tensor-compiled", "ours-row", "ours-row-compiled",
                 "auto")  # fmt: skip

CONTESTS = {
    "decoder-8b-slice": Contest(
        contenders=_DECODER,
        more=_DECODER_MORE,
        targets=(
            Target(ours=COMPILED, peer=TORCHAO, least=1.05),
            Target(ours=COMPILED[:1], peer=TORCHAO, least=0.95),
            Target(ours=COMPILED[:1], peer="bf16-compiled", least=1.25),
            Target(ours=EAGER, peer=TORCHAO, least=1 / 1.1),
            Target(ours=EAGER, metric="first_step_s", most=10.0),
        ),
    ),
    "decoder-1.3b": Contest(
        contenders=_DECODER,
        more=_DECODER_MORE,
        targets=(
            Target(ours=COMPILED, peer=TORCHAO, least=1.05),
            Target(ours=COMPILED, peer="bf16-compiled", least=1.25),
            Target(ours=EAGER, peer=REFERENCE, least=1.25),
            Target(ours=COMPILED, metric="peak_gib", peer=TORCHAO, least=1.0),
        ),
    ),
    "bert-base": Contest(
        contenders=(REFERENCE, "bf16-compiled", TORCHAO, "ours-block", "ours-block-compiled", "auto"),
        more=("torchao-row-compiled", "ours-tensor", "ours-tensor-compiled", "ours-row", "ours-row-compiled"),
        targets=(Target(ours=("auto",), peer=REFERENCE, least=1 / NOISE),),
    ),
    "resnet50": Contest(
        contenders=(REFERENCE, "bf16-compiled", "auto", "auto-compiled"),
        targets=(Target(ours=("auto-compiled",), peer="bf16-compiled", least=1 / NOISE),),
    ),
}


def check_losses(
    losses: Sequence[float | None], reference: Sequence[float | None], *, whose: str = REFERENCE
) -> tuple[str, float | None]:
    """'passed' or why the timing is void, and the largest relative difference after the first step.

    A loss of None was not finite, or its step was not applied.
    """
    pairs = list(zip(losses, reference, strict=True))
    for step, pair in enumerate(pairs, start=1):
        if None in pair:
            return f"void: the loss of step {step} is not finite" + ("" if pair[0] is None else f" in {whose}"), None
    apart = [abs(ours - theirs) / abs(theirs) for ours, theirs in pairs[1:]]  # type: ignore[operator, arg-type]
    worst = max(apart)
    if worst > LOSS_TOLERANCE:
        return f"void: the loss of step {apart.index(worst) + 2} is {100 * worst:.2f} % from that of {whose}", worst
    return "passed", worst


def number(result: Mapping[str, Any], metric: str) -> float | None:
    """A contender's number: the median where there is a spread; None where the timing does not count."""
    if result.get("check") != "passed":
        return None
    value = result.get(metric)
    return value["median"] if isinstance(value, Mapping) else value


def judge(target: Target, results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The target's outcome: met, missed, or not measured because a side is missing or void."""
    times = {name: number(results.get(name, {}), "step_ms") for name in target.ours}
    ran = {name: time for name, time in times.items() if time is not None}
    outcome: dict[str, Any] = {"what": target.what, "contender": min(ran, key=ran.__getitem__) if ran else None}
    ours = number(results[outcome["contender"]], target.metric) if ran else None
    peer = number(results.get(target.peer, {}), target.metric) if target.peer else None
    if ours is None or (target.peer and peer is None):
        return {**outcome, "value": None, "outcome": "not measured"}
    value = ours if peer is None else peer / ours
    met = value <= target.most if peer is None else value >= target.least
    return {**outcome, "value": round(value, 4), "outcome": "met" if met else "missed"}
