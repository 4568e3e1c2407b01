"""What is demanded of offloading, and the outcome by the cases that were measured so far. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Cases = Mapping[str, Mapping[str, Any]]

FREED, SLOWER, PREDICTED, HIDDEN = 0.60, 1.10, 0.15, 0.80
_SHARES = ("", "-70", "-65", "-60")
_STEPPED_EARLY = [f"{mode}{share}" for mode in ("immediate", "backward") for share in _SHARES]
_STEPPED_EARLY_4 = [f"{mode}-4{share}" for mode in ("immediate", "backward") for share in _SHARES]
TORCHAO = {
    "torchao": ("sync", "speculative", "sync-without-undo", "speculative-65", *_STEPPED_EARLY),
    "torchao-gradients": ("sync", "speculative", "sync-without-undo"),
    "torchao-4": ("sync-4", "speculative-4", "delayed-4", "speculative-4-65", *_STEPPED_EARLY_4),
    "fp32-torchao": (
        *("fp32-sync", "fp32-speculative", "fp32-sync-without-undo", "fp32-speculative-65"),
        *(f"fp32-{name}" for name in _STEPPED_EARLY),
    ),
}
"""Arms of torchao, and those of ours that train the same. All of ours but 'delayed' have the numbers of AdamW; torchao
keeps no state to take a step back, and of BF16 weights no masters."""
ACCUMULATING = TORCHAO["torchao-4"]
MEMORY = (
    ("device", "sync"), ("device", "speculative-65"), ("device-4", "sync-4"), ("device-4", "delayed-4"),
    ("device-4", "speculative-4-65"), *(("device", name) for name in _STEPPED_EARLY),
    *(("device-4", name) for name in _STEPPED_EARLY_4),
)  # fmt: skip
"""Arms on the device, and those whose state is compared with theirs."""
LATE = {"speculative": "sync", "delayed": "sync", "speculative-4": "sync-4", "delayed-4": "sync-4"}
"""Arms that hide the host's step, and the ones in which it was timed."""
SHARED = dict.fromkeys([*_STEPPED_EARLY, *_STEPPED_EARLY_4], "sync-without-undo")
"""The same; of 'immediate' the host's step is that of the share of the values that it offloads."""


def targets(cases: Cases) -> list[dict[str, Any]]:
    """Each demand with its value and 'met' or 'missed', as far as what it needs was measured."""
    demands = (_memory, _torchao, _accumulation, _prediction, _exact, _hidden)
    return [target for demand in demands for target in demand(cases)]


def _target(what: str, contender: str, value: float, is_met: bool) -> dict[str, Any]:
    return {"what": what, "contender": contender, "value": round(value, 7), "outcome": "met" if is_met else "missed"}


def _ms(cases: Cases, name: str) -> float | None:
    spread = cases.get(name, {}).get("step_ms")
    return None if spread is None else float(spread["median"])


def _memory(cases: Cases) -> list[dict[str, Any]]:
    found = []
    for on_device, offloaded in MEMORY:
        whole, left = (cases.get(name, {}).get("state_bytes") for name in (on_device, offloaded))
        if whole and left is not None:
            gone = 1 - left / whole
            what = f"state memory gone, of {on_device}'s; {FREED:.0%} wanted"
            found.append(_target(what, offloaded, gone, gone >= FREED))
    return found


def _torchao(cases: Cases) -> list[dict[str, Any]]:
    found = []
    for theirs, ours in TORCHAO.items():
        for name in ours:
            mine, other = _ms(cases, name), _ms(cases, theirs)
            if mine and other:
                found.append(_target(f"step over {theirs}'s; below 1 wanted", name, mine / other, mine < other))
    return found


def _accumulation(cases: Cases) -> list[dict[str, Any]]:
    whole = _ms(cases, "device-4")
    found = []
    for name in ACCUMULATING:
        mine = _ms(cases, name)
        if mine and whole:
            what = f"step of 4 micro-batches over device-4's; {SLOWER} wanted"
            found.append(_target(what, name, mine / whole, mine / whole <= SLOWER))
    return found


def _prediction(cases: Cases) -> list[dict[str, Any]]:
    found = []
    for name, case in cases.items():
        taken = _ms(cases, name)
        if taken and case.get("predicted_ms") is not None:
            error = case["predicted_ms"] / taken - 1
            found.append(_target(f"prediction's error; {PREDICTED} wanted", name, error, abs(error) <= PREDICTED))
    return found


def _exact(cases: Cases) -> list[dict[str, Any]]:
    case = cases.get("exact", {})
    if "differing_from_host_adamw" not in case:
        return []
    differing, relative = case["differing_from_host_adamw"], case["relative_to_device_adamw"]
    return [
        _target("FP32 weights that differ from the host's AdamW; 0 wanted", "exact", differing, differing == 0),
        _target("relative difference to the device's AdamW; 1e-6 wanted", "exact", relative, relative <= 1e-6),
    ]


def _hidden(cases: Cases) -> list[dict[str, Any]]:
    """Demanded where the host's step is shorter than forward and backward; said in any case."""
    found = []
    for name, timed in (LATE | SHARED).items():
        taken, host = _ms(cases, name), cases.get(timed, {}).get("host_step_ms")
        if not taken or not host:
            continue
        if name in SHARED:
            host *= cases[name]["share"]
        bare = cases[name]["bare_ms"]
        device = 1e3 * cases[name]["prediction"]["device"]  # with the step of what stays there, which is not the host's
        hidden = 1 - (taken - device) / host
        target = _target(f"share of the host's step that is hidden; {HIDDEN} wanted", name, hidden, hidden >= HIDDEN)
        if host >= bare:
            target["outcome"] = "not demanded: the host's step takes longer than forward and backward"
        found.append(target)
    return found
