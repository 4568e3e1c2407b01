"""The ways a model can be run for inference, as values, and which of them a device and a model have."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from deepseek_mp.errors import ConfigError, explain

FORMATS = ("fp32", "tf32", "hf32", "bf16", "fp16")
"""Of weights and products; the more precise ones first."""
WEIGHTS = ("int8", "fp8")
"""In which the weights of linear layers may be kept, with activations and products in 16 bits."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How weights are kept and multiplied, and how the code runs.

    Raises:
        ConfigError: weights in 8 bits beside activations that are not of 16.
    """

    format: str = "fp32"
    """'fp32', 'tf32', 'hf32' (weights in FP32), 'bf16' or 'fp16' (weights and activations in that)."""
    weights: str | None = None
    """'int8' or 'fp8': those of large linear layers, with a scale for each output channel; None: as the format says."""
    channels_last: bool = False
    """Weights of convolutions and images have their channels innermost in memory."""
    folded: bool = False
    """BatchNorm is part of the convolution before it."""
    compiled: bool = False
    graphed: bool = False
    """Calls are recorded as CUDA graphs, one for each kind of input, and replayed."""

    def __post_init__(self) -> None:
        if self.weights is not None and (self.weights not in WEIGHTS or self.format not in ("bf16", "fp16")):
            passed = f"weights={self.weights!r} with format={self.format!r}"
            allowed = f"{', '.join(map(repr, WEIGHTS))} or None, with 'bf16' or 'fp16'"
            raise ConfigError(explain(passed, allowed, "Use format='bf16' for weights in 8 bits"))

    @property
    def name(self) -> str:
        """Like 'bf16+channels_last+folded+compiled', or 'bf16+int8_weights'."""
        marks = [mark for mark in ("channels_last", "folded", "compiled", "graphed") if getattr(self, mark)]
        return "+".join([self.format, *([f"{self.weights}_weights"] if self.weights else []), *marks])

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def baselines(formats: Collection[str], *, compiled: bool, graphed: bool = False) -> list[Form]:
    """What every result is shown beside: FP32, the device's faster FP32, BF16, both ends compiled, BF16 as a graph."""
    eager = [Form(format=name) for name in ("fp32", "tf32", "hf32", "bf16") if name in formats]
    fast = [Form(format=name, compiled=True) for name in ("fp32", "bf16") if compiled and name in formats]
    return eager + fast + [replace(form, graphed=True) for form in fast if graphed and form.format == "bf16"]


def candidates(
    formats: Collection[str],
    *,
    images: bool,
    norms: bool,
    compiled: bool,
    graphed: bool = False,
    weights: Collection[str] = (),
) -> list[Form]:
    """All forms to be tried, the baselines first, those with weights in 8 bits last.

    Args:
        formats: names of what the device multiplies; those that are no format of inference here are passed over.
        images: the model has convolutions, whose layout matters.
        norms: it has BatchNorms that may be folded.
        compiled: the compiler may be tried.
        graphed: calls may be recorded; in 16 bits, where the host's time is a large part of a call's.
        weights: in which of 8 bits the weights of linear layers may be kept; beside `narrow` activations only.
    """
    first = baselines(formats, compiled=compiled, graphed=graphed)
    ways = [
        Form(channels_last=images, folded=norms, compiled=code) for code in ((False, True) if compiled else (False,))
    ]
    return list(dict.fromkeys([*first, *_others(formats, weights, ways, graphed)]))


def narrow(formats: Collection[str]) -> str | None:
    """The format of activations beside weights in 8 bits: BF16, FP16 where there is no BF16, None without either."""
    return next((name for name in ("bf16", "fp16") if name in formats), None)


def _others(formats: Collection[str], weights: Collection[str], ways: list[Form], graphed: bool) -> Iterator[Form]:
    kinds: list[tuple[str, str | None]] = [(name, None) for name in FORMATS if name in formats]
    beside = narrow(formats)
    kinds += [(beside, kept) for kept in WEIGHTS if beside is not None and kept in weights]
    for name, kept in kinds:
        forms = [replace(way, format=name, weights=kept) for way in ways]
        yield from forms
        if graphed and name in ("bf16", "fp16"):
            yield from (replace(form, graphed=True) for form in forms)
