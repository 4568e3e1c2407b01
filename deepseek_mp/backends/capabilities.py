"""What a device can multiply: the capability table as frozen values, and the answer for one device.

`capabilities.json` holds a row per chip family, with its sources and a confidence (A read in source
or measured, B a peer's table or derived, C a secondary page). A backend says which row a device is;
`resolve` turns the row into `Capabilities`. A device that is in no row gets FP32 and no peak: the
table is never extended by a guess.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Any

from deepseek_mp.errors import FormatError, explain
from deepseek_mp.precision import FORMATS, find_format

TRAINABLE = ("bf16", "fp16", "tf32", "hf32", "fp32")
"""Formats this release trains in, in the order of a first guess."""
UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Combination:
    """Formats to train in: products in `compute`, what does not tolerate it in `fallback`, parameters in `master`."""

    compute: str
    fallback: str
    master: str
    loss_scaling: bool
    """Whether gradients need a loss scale to stay inside the range of `compute`."""
    reason: str

    def __str__(self) -> str:
        """The usual short form: `BF16+FP32`, `FP16/HF32+FP32`, `FP32`."""
        names = [self.compute] if self.fallback in (self.compute, self.master) else [self.compute, self.fallback]
        short = "/".join(name.upper() for name in names)
        return short if self.compute == self.master else f"{short}+{self.master.upper()}"

    def to_json(self) -> dict[str, Any]:
        return {
            "compute": self.compute,
            "fallback": self.fallback,
            "master": self.master,
            "loss_scaling": self.loss_scaling,
            "reason": self.reason,
        }


def fp32_only(reason: str) -> Combination:
    """The conservative combination, for a device of which nothing faster is known to be safe."""
    return Combination(compute="fp32", fallback="fp32", master="fp32", loss_scaling=False, reason=reason)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Which row of the table a device is, and where this very device differs from its row."""

    row: str | None
    """Row id, or None when the device is in no row."""
    device_name: str
    exact: bool = True
    """False for a near relative of the row's chip: the formats hold, the peaks do not."""
    added: frozenset[str] = frozenset()
    dropped: frozenset[str] = frozenset()
    overflow: str | None = None
    """Overrides the row's overflow behaviour when the device itself says otherwise."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What one device can do, in the format names of `precision.FORMATS`. Frozen, hashable, JSON-able."""

    id: str
    """Row id of the table (`sm_90`), or `unknown`."""
    vendor: str
    backend: str
    device_name: str
    matmul_formats: frozenset[str]
    """Formats the device multiplies in hardware."""
    emulated_formats: frozenset[str]
    """Formats PyTorch can execute on the device although it has no units for them."""
    fast_fp32: str
    """none | tf32 | hf32 | tf32-optin | bf16-optin: what FP32 products may silently become."""
    overflow: str
    """ieee: overflow gives an infinity; saturate: it gives the largest finite value."""
    flushes_subnormals: frozenset[str]
    """Formats whose subnormals the matrix units read and write as zero."""
    peak_tflops: Mapping[str, float] = field(hash=False)
    """Dense peak by format; empty when the peak of this very device is not known."""
    recommended: Combination
    notes: tuple[str, ...]
    confidence: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "peak_tflops", MappingProxyType(dict(self.peak_tflops)))

    def admissible(self) -> tuple[str, ...]:
        """Formats this release can train in on the device without emulation, best guess first."""
        first = self.recommended.compute
        native = [name for name in TRAINABLE if name in self.matmul_formats]
        return tuple(sorted(native, key=lambda name: name != first))

    def smallest_useful(self, format: str) -> float:
        """Smallest magnitude a product can rely on: normal where subnormals are flushed, else subnormal."""
        found = find_format(format)
        return found.smallest_normal if format in self.flushes_subnormals else found.smallest_subnormal

    def nearest(self, format: str) -> str:
        """The native floating format nearest to `format`, by width and then by significant bits."""
        wanted = find_format(format)

        def distance(name: str) -> tuple[int, int, bool, int]:
            near = FORMATS[name]
            width = abs(near.storage_bits - wanted.storage_bits)
            exponent = abs(near.exponent_bits - wanted.exponent_bits)
            return width, abs(near.bits - wanted.bits), name != self.recommended.compute, exponent

        return min((n for n in sorted(self.matmul_formats) if FORMATS[n].is_float), key=distance)

    def require(self, format: str, *, emulate: bool) -> bool:
        """True when the device has `format` natively, False when it will be emulated.

        `FormatError` when it has not and `emulate` is off, or when PyTorch cannot execute it there
        at all; tf32 and hf32 are properties of matrix units and cannot be emulated.
        """
        if find_format(format).name in self.matmul_formats:
            return True
        possible = format in self.emulated_formats
        if possible and emulate:
            return False
        change = f"Use {self.nearest(format)!r}, the nearest it has"
        if possible:
            change += ", or pass emulate=True to run it slowly without units for it"
        native = ", ".join(name for name in FORMATS if name in self.matmul_formats)
        raise FormatError(explain(f"{self.device_name} ({self.id}) does not multiply {format}", native, change))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, formats in the order of `precision.FORMATS`."""
        return {
            "id": self.id,
            "vendor": self.vendor,
            "backend": self.backend,
            "device_name": self.device_name,
            "matmul_formats": _in_order(self.matmul_formats),
            "emulated_formats": _in_order(self.emulated_formats),
            "fast_fp32": self.fast_fp32,
            "overflow": self.overflow,
            "flushes_subnormals": _in_order(self.flushes_subnormals),
            "peak_tflops": dict(self.peak_tflops),
            "recommended": self.recommended.to_json(),
            "notes": list(self.notes),
            "confidence": self.confidence,
        }


def _in_order(formats: frozenset[str]) -> list[str]:
    return [name for name in FORMATS if name in formats]


@cache
def table() -> Mapping[str, Mapping[str, Any]]:
    """The rows of `capabilities.json` by id, in the file's order."""
    text = files(__package__).joinpath("capabilities.json").read_text(encoding="utf-8")
    return MappingProxyType({row["id"]: MappingProxyType(row) for row in json.loads(text)["rows"]})


def rows_of(backend: str) -> list[Mapping[str, Any]]:
    """The rows of one backend."""
    return [row for row in table().values() if row["backend"] == backend]


def resolve(identity: Identity, *, vendor: str, backend: str, executes: frozenset[str]) -> Capabilities:
    """The capabilities of an identified device; `executes` are the formats PyTorch runs there without units."""
    if identity.row is None:
        return _unknown(identity, vendor=vendor, backend=backend, executes=executes)
    row = table()[identity.row]
    native = (frozenset(row["matmul_formats"]) | identity.added) - identity.dropped
    recommended = Combination(**row["recommended"])
    if recommended.compute not in native:
        recommended = fp32_only(f"this part lacks the {recommended.compute} units of its family")
    return Capabilities(
        id=identity.row,
        vendor=vendor,
        backend=backend,
        device_name=identity.device_name,
        matmul_formats=native,
        emulated_formats=(frozenset(row.get("emulated_formats", ())) | executes) - native,
        fast_fp32=row["fast_fp32"],
        overflow=identity.overflow or row["overflow"],
        flushes_subnormals=frozenset(row.get("flushes_subnormals", ())),
        peak_tflops=_peaks(row, identity),
        recommended=recommended,
        notes=(*row.get("notes", ()), *identity.notes),
        confidence=row["confidence"],
    )


def _peaks(row: Mapping[str, Any], identity: Identity) -> Mapping[str, float]:
    """The row's peaks, if they are those of this product: one chip family spans many of different speed."""
    name = identity.device_name
    whole = identity.exact and "MIG" not in name
    if whole and any(re.search(pattern, name) for pattern in row.get("peak_names", ())):
        return row["peak_tflops"]  # type: ignore[no-any-return]
    return {}


def _unknown(identity: Identity, *, vendor: str, backend: str, executes: frozenset[str]) -> Capabilities:
    native = frozenset({"fp32"})
    return Capabilities(
        id=UNKNOWN,
        vendor=vendor,
        backend=backend,
        device_name=identity.device_name,
        matmul_formats=native,
        emulated_formats=executes - native,
        fast_fp32="none",
        overflow=identity.overflow or "ieee",
        flushes_subnormals=frozenset(),
        peak_tflops={},
        recommended=fp32_only("unknown device"),
        notes=("not in the capability table: only FP32 is used, and its peak is unknown", *identity.notes),
        confidence="C",
    )


def markdown_table() -> str:
    """The table as Markdown, for `docs/backends.md`: device, formats, recommended combination, why."""
    lines = [
        "| id | for example | multiplies natively | fast FP32 | overflow | recommended | why |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table().values():
        native = ", ".join(name for name in FORMATS if name in row["matmul_formats"])
        combination = Combination(**row["recommended"])
        cells = [row["id"], row["example"], native, row["fast_fp32"], row["overflow"]]
        lines.append("| " + " | ".join([*cells, str(combination), combination.reason]) + " |")
    return "\n".join(lines)
