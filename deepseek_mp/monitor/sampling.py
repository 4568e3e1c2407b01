"""How statistics are sampled: how often, of how many layers and rows, and in which formats beside the one in use."""

from __future__ import annotations

from dataclasses import dataclass

from deepseek_mp.errors import ConfigError, FormatError, explain, suggest
from deepseek_mp.precision import FORMATS, RECIPES

MOST_ROWS = 256
"""More rows of a tensor tell little more, and a sampled step is to stay a short one."""
WHAT_IF = ("bf16", "fp16", "fp8_e4m3", "fp8_e5m2")
_FORMATS = tuple(name for name, f in FORMATS.items() if f.bits < FORMATS["fp32"].bits and f.special != "scale")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the statistics of a `PrecisionMonitor`; `ConfigError` if one has a wrong value."""

    every: int = 50
    """Calls of the model, with gradients on, from one sampled step to the next; the first call is sampled."""
    units: int = 2
    """Layers that are looked at on a sampled step. All take their turn."""
    rows: int = 64
    """Rows of a tensor that are looked at, at most 256; of a weight whose rows share scales, one block at least."""
    formats: tuple[str, ...] = WHAT_IF
    """What the tensors are rounded to beside the format in use: formats, those of 8 bits and less with the scales of
    the recipe that is best on the device; or recipes."""
    decay: float = 0.9
    """Of the exponential means, from one sample of a layer to the next."""
    seed: int = 0
    """Of the choice of rows."""

    def __post_init__(self) -> None:
        for name, most in (("every", None), ("units", None), ("rows", MOST_ROWS)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not whole or value < 1 or (most is not None and value > most):
                upper = "" if most is None else f" to {most}"
                raise ConfigError(explain(f"{name}={value!r}", f"a whole number from 1{upper}", f"Change {name}"))
        if not isinstance(self.decay, int | float) or not 0 <= self.decay < 1:
            raise ConfigError(explain(f"decay={self.decay!r}", "a number from 0 and below 1", "0 keeps no past"))
        if not isinstance(self.seed, int):
            raise ConfigError(explain(f"seed={self.seed!r}", "a whole number", "Change seed"))
        object.__setattr__(self, "formats", tuple(self.formats))
        for name in self.formats:
            if name not in _FORMATS and name not in RECIPES:
                allowed = ", ".join(dict.fromkeys((*_FORMATS, *RECIPES)))
                change = f"Use one of these.{suggest(str(name), (*_FORMATS, *RECIPES))}"
                raise FormatError(explain(f"formats with {name!r}", allowed, change))
