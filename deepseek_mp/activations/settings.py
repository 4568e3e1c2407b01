"""Settings of compressed activations, each with what it rests on."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.precision import Rounding

GROUPS = (32, 128)
_LARGEST_SEED = 1 << 63


@dataclass(frozen=True, kw_only=True)
class ActivationSettings:
    """Which saved tensors are compressed, and how.

    Raises:
        ConfigError: a value is not allowed.
    """

    min_bytes: int = 1 << 20
    """Smaller tensors are left alone: a few large ones hold nearly all of the bytes, and each costs some kernels."""
    group: int = 128
    """Values, next to each other in memory, that share an FP32 scale: 32 or 128."""
    rounding: Rounding = Rounding.STOCHASTIC
    """Stochastic, so that what is linear in a saved tensor (a weight's gradient) is right on average; or nearest, with
    half of the error energy, which does not average out."""
    keep: tuple[str, ...] = ()
    """Shell globs over module names; what these modules, and those inside them, save is left alone."""
    recompute_norm_relu: bool = False
    """Compute the output of a BatchNorm and ReLU again in the backward, where that gives the same bits, instead of
    storing it. The BatchNorm's input is then kept as it is: exact, and larger than both in FP8."""
    seed: int = 0
    """Of stochastic rounding. PyTorch's generators are not touched."""

    def __post_init__(self) -> None:
        if self.min_bytes < 1:
            raise ConfigError(explain(f"min_bytes={self.min_bytes}", "1 byte or more", "Pass for example 1 << 20"))
        if self.group not in GROUPS:
            raise ConfigError(explain(f"group={self.group}", "32, 128", "Use one of these"))
        if self.rounding not in tuple(Rounding):
            allowed = ", ".join(member.value for member in Rounding)
            raise ConfigError(explain(f"rounding={self.rounding!r}", allowed, "Use one of these"))
        several = isinstance(self.keep, Collection) and not isinstance(self.keep, str)
        if not several or not all(isinstance(pattern, str) for pattern in self.keep):
            raise ConfigError(
                explain(f"keep={self.keep!r}", "a tuple of globs", "Pass for example ('head', '*.norm*')")
            )
        if not 0 <= self.seed < _LARGEST_SEED:
            raise ConfigError(explain(f"seed={self.seed}", "a whole number of 63 bits", "Pass for example 0"))
        object.__setattr__(self, "rounding", Rounding(self.rounding))
        object.__setattr__(self, "keep", tuple(self.keep))

    def keeps(self, module: str) -> bool:
        """Whether a pattern matches the name of the module or of one around it."""
        if not self.keep:
            return False
        parts = module.split(".")
        names = [".".join(parts[: count + 1]) for count in range(len(parts))]
        return any(fnmatchcase(name, pattern) for pattern in self.keep for name in names)
