"""What the inference benchmark demands of each case, as data, and how the demands are judged."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SAME = 1.03
"""How much slower still counts as equal."""
METRICS = {"ms": "latency", "joules": "energy", "above_idle_joules": "energy above idle"}


@dataclass(frozen=True, kw_only=True)
class Target:
    """A demand on the fastest of ours: in proportion to the fastest of some peers, or by itself."""

    most: float
    """Of ours divided by the peer's; without peers, of ours."""
    peers: tuple[str, ...] = ()
    metric: str = "ms"
    kinds: tuple[str, ...] = ("",)
    """Parts of names: only such of ours count."""
    named: str = ""
    """What the peers are called, where they are many."""

    @property
    def what(self) -> str:
        which = f" with {' or '.join(self.kinds)}" if self.kinds != ("",) else ""
        unit = "ms" if self.metric == "ms" else "J"
        limit = f"{self.most:g} x {self.named or ' or '.join(self.peers)}" if self.peers else f"{self.most:g} {unit}"
        return f"{METRICS[self.metric]} of ours{which} <= {limit}"


def _shares(
    latency: float, energy: float, peers: tuple[str, ...], kinds: tuple[str, ...] = ("",)
) -> tuple[Target, ...]:
    joules = [Target(most=energy, peers=peers, metric=key, kinds=kinds) for key in ("joules", "above_idle_joules")]
    return (Target(most=latency, peers=peers, kinds=kinds), *joules)


_GPT3 = (*_shares(0.57, 0.59, ("fp32",)), Target(most=0.70, peers=("bf16+compiled",)))
_COMPILED = tuple(f"{name}+{way}" for name in ("bf16", "fp16") for way in ("compiled", "compiled+graphed"))
_IMAGES = tuple(f"{name}+channels_last+compiled+graphed" for name in ("bf16", "fp16"))
_SEARCHED = ("bf16+max-autotune+graphed", "bf16+channels_last+max-autotune+graphed")
_BEST = (
    Target(
        most=SAME, peers=(*_COMPILED, *_IMAGES, *_SEARCHED), kinds=("chosen",), named="the best compiled in 16 bits"
    ),
)

TARGETS: Mapping[str, tuple[Target, ...]] = {
    "decoder-7b-token": (
        *_shares(0.55, 0.60, ("bf16+graphed",), ("int8", "fp8")),
        *_shares(0.55, 0.60, ("bf16+compiled+graphed",), ("int8", "fp8")),
    ),
    "decoder-7b-prefill": (Target(most=8.5),),
    "gpt3-slice-prefill": _GPT3,
    "gpt3-slice-token": _GPT3,
    **dict.fromkeys(("bert-base-1", "bert-base-64", "resnet50-1", "resnet50-64"), _BEST),
}


def fastest(arms: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> str | None:
    """The one of these that was timed and counts, with the lowest median."""
    ran = {name: arms[name]["ms"]["median"] for name in names if arms.get(name, {}).get("ms") and passed(arms[name])}
    return min(ran, key=ran.__getitem__) if ran else None


def ours(arms: Mapping[str, Any], kinds: Sequence[str] = ("",)) -> list[str]:
    """Names of this package's arms with one of the kinds in it."""
    return [name for name in arms if name.startswith("ours ") and any(kind in name for kind in kinds)]


def passed(arm: Mapping[str, Any]) -> bool:
    return arm.get("check") == "passed"


def contenders(case: str, arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Those whose energy a target asks for: the fastest on each side."""
    found: list[str | None] = []
    for target in TARGETS[case]:
        if target.metric != "ms":
            found += [fastest(arms, target.peers), fastest(arms, ours(arms, target.kinds))]
    return list(dict.fromkeys(name for name in found if name))


def judge(target: Target, arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The demand's outcome: reached, missed, or not measured because a side is missing or void."""
    mine = fastest(arms, ours(arms, target.kinds))
    peer = fastest(arms, target.peers) if target.peers else None
    outcome: dict[str, Any] = {
        "what": target.what,
        "ours": mine,
        "peer": peer,
        "value": None,
        "outcome": "not measured",
    }
    if mine is None or (target.peers and peer is None):
        return outcome
    top = number(arms[mine], target.metric)
    below = 1.0 if peer is None else number(arms[peer], target.metric)
    value = _in_rounds(arms[mine], arms[peer]) if peer and target.metric == "ms" else _divided(top, below)
    if value is None or not math.isfinite(value):
        return outcome
    return {**outcome, "value": round(value, 4), "outcome": "reached" if value <= target.most else "missed"}


def number(arm: Mapping[str, Any], metric: str) -> float | None:
    """An arm's number; None where it was not measured."""
    if metric == "ms":
        return float(arm["ms"]["median"])
    value = (arm.get("energy") or {}).get(metric)
    return None if value is None else float(value)


def _divided(top: float | None, below: float | None) -> float | None:
    return None if top is None or not below or below < 0 else top / below


def _in_rounds(mine: Mapping[str, Any], peer: Mapping[str, Any]) -> float:
    """The median of the ratios of the rounds."""
    ratios = [float(a / b) for a, b in zip(mine["round_ms"], peer["round_ms"], strict=True)]
    return statistics.median(ratios)
