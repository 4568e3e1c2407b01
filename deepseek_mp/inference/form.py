"""The ways a model can be run for inference, as values, and which of them a device and a model have."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

FORMATS = ("fp32", "tf32", "hf32", "bf16", "fp16")
"""Of weights and products; the more precise ones first."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How weights are kept and multiplied, and how the code runs."""

    format: str = "fp32"
    """'fp32', 'tf32', 'hf32' (weights in FP32), 'bf16' or 'fp16' (weights and activations in that)."""
    channels_last: bool = False
    """Weights of convolutions and images have their channels innermost in memory."""
    folded: bool = False
    """BatchNorm is part of the convolution before it."""
    compiled: bool = False

    @property
    def name(self) -> str:
        """Like 'bf16+channels_last+folded+compiled'."""
        marks = [mark for mark in ("channels_last", "folded", "compiled") if getattr(self, mark)]
        return "+".join([self.format, *marks])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def baselines(formats: Collection[str], *, compiled: bool) -> list[Form]:
    """What every result is shown beside: FP32 and the device's faster FP32, BF16, and both ends compiled."""
    eager = [Form(format=name) for name in ("fp32", "tf32", "hf32", "bf16") if name in formats]
    return eager + [Form(format=name, compiled=True) for name in ("fp32", "bf16") if compiled and name in formats]


def candidates(formats: Collection[str], *, images: bool, norms: bool, compiled: bool) -> list[Form]:
    """All forms to be tried, the baselines first.

    Args:
        formats: names of what the device multiplies; those that are no format of inference here are passed over.
        images: the model has convolutions, whose layout matters.
        norms: it has BatchNorms that may be folded.
        compiled: the compiler may be tried.
    """
    return list(dict.fromkeys([*baselines(formats, compiled=compiled), *_others(formats, images, norms, compiled)]))


def _others(formats: Collection[str], images: bool, norms: bool, compiled: bool) -> Iterator[Form]:
    for name in FORMATS:
        if name in formats:
            for compile in (False, True) if compiled else (False,):
                yield Form(format=name, channels_last=images, folded=norms, compiled=compile)
