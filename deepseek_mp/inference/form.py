"""The ways a model can be run for inference, as values, and which of them a device and a model have."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from deepseek_mp.errors import ConfigError, explain, suggest

FORMATS = ("fp32", "tf32", "hf32", "bf16", "fp16")
"""Of weights and products; the more precise ones first."""
INT8 = "int8"
"""Of weights and activations: a form of models trained for it (`QuantizationAwareTrainer`); none of `Served`."""
LINEAR_KINDS = ("int8_weights", "fp8_weights", "fp8", "int4_weights")
"""Of large linear layers, with activations in 16 bits around them: what `inference.linear_kinds` describes."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """How weights are kept and multiplied, and how the code runs.

    Raises:
        ConfigError: another format; a kind of linear layers that there is not, or beside a format that is not of 16
            bits; or both one for all layers and some by name.
    """

    format: str = "fp32"
    """'fp32', 'tf32', 'hf32' (weights in FP32), 'bf16' or 'fp16' (weights and activations in that), or `INT8`."""
    linear: str | None = None
    """The kind of all large linear layers, one of `LINEAR_KINDS`; None: as the format says."""
    layers: tuple[tuple[str, str], ...] = ()
    """Kinds of linear layers by name, the others being as the format says; in place of `linear`."""
    channels_last: bool = False
    """Weights of convolutions and images have their channels innermost in memory."""
    folded: bool = False
    """BatchNorm is part of the convolution before it."""
    compiled: bool = False
    graphed: bool = False
    """Calls are recorded as CUDA graphs, one for each kind of input, and replayed."""

    def __post_init__(self) -> None:
        if self.format not in (*FORMATS, INT8):
            change = f"Use one of these.{suggest(str(self.format), FORMATS)}"
            raise ConfigError(explain(f"format={self.format!r}", ", ".join(map(repr, FORMATS)), change))
        pairs = isinstance(self.layers, tuple) and all(isinstance(one, tuple) and len(one) == 2 for one in self.layers)
        if not pairs:
            change = "Pass (('name', 'int8_weights'), ...)"
            raise ConfigError(explain(f"layers={self.layers!r}", "a tuple of pairs of a name and a kind", change))
        kinds = {kind for _, kind in self.layers} | ({self.linear} if self.linear is not None else set())
        if kinds and (not kinds <= set(LINEAR_KINDS) or self.format not in ("bf16", "fp16")):
            passed = f"linear layers of {', '.join(sorted(map(repr, kinds)))} with format={self.format!r}"
            allowed = f"{', '.join(map(repr, LINEAR_KINDS))}, with 'bf16' or 'fp16'"
            raise ConfigError(explain(passed, allowed, "Use one of these, with format='bf16'"))
        names = [name for name, _ in self.layers]
        if (self.linear is not None and names) or len(set(names)) < len(names):
            passed = f"linear={self.linear!r} and layers={self.layers!r}"
            raise ConfigError(explain(passed, "one of the two, a name once", "Leave linear=None to name layers"))

    @property
    def name(self) -> str:
        """Like 'bf16+channels_last+folded+compiled', or 'bf16+int8_weights'."""
        marks = [mark for mark in ("channels_last", "folded", "compiled", "graphed") if getattr(self, mark)]
        linear = [f"mixed({len(self.layers)})"] if self.layers else [self.linear] if self.linear else []
        return "+".join([self.format, *linear, *marks])

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
    linear: Collection[str] = (),
) -> list[Form]:
    """All forms to be tried, the baselines first, those with linear layers of a kind of their own last.

    Args:
        formats: names of what the device multiplies; those that are no format of inference here are passed over.
        images: the model has convolutions, whose layout matters.
        norms: it has BatchNorms that may be folded.
        compiled: the compiler may be tried.
        graphed: calls may be recorded; in 16 bits, where the host's time is a large part of a call's.
        linear: kinds of large linear layers that may be tried; beside `narrow` activations only.
    """
    first = baselines(formats, compiled=compiled, graphed=graphed)
    ways = [
        Form(channels_last=images, folded=norms, compiled=code) for code in ((False, True) if compiled else (False,))
    ]
    return list(dict.fromkeys([*first, *_others(formats, linear, ways, graphed)]))


def narrow(formats: Collection[str]) -> str | None:
    """The format of activations beside linear layers of their own kind: BF16, or FP16, or None without either."""
    return next((name for name in ("bf16", "fp16") if name in formats), None)


def _others(formats: Collection[str], linear: Collection[str], ways: list[Form], graphed: bool) -> Iterator[Form]:
    kinds: list[tuple[str, str | None]] = [(name, None) for name in FORMATS if name in formats]
    beside = narrow(formats)
    kinds += [(beside, kind) for kind in LINEAR_KINDS if beside is not None and kind in linear]
    for name, kind in kinds:
        forms = [replace(way, format=name, linear=kind) for way in ways]
        yield from forms
        if graphed and name in ("bf16", "fp16"):
            yield from (replace(form, graphed=True) for form in forms)
