"""Number formats as values: each computes its own range and spacing from its bit layout.

A floating format is a sign, an exponent and a mantissa field. What the codes at the ends of the
range mean is a convention, and formats of equal width may differ in nothing else:

- `ieee`: the top exponent holds infinities and NaNs (fp16, bf16, tf32, fp8_e5m2);
- `fn` (finite): no infinity, and only the all-ones code of either sign is NaN (OCP fp8_e4m3);
- `fnuz` (finite, unsigned zero): the code of negative zero is the one NaN, and the bias is one
  larger, so the same byte means half the value of its OCP twin (AMD gfx942);
- `all`: every code is a number (fp4_e2m1);
- `scale`: an exponent alone, so powers of two without sign or zero; the top code is NaN (e8m0);
- `int`: no exponent; values one apart, in two's complement.

Sources: IEEE 754-2019; OCP 8-bit floating point specification 1.0; OCP microscaling formats 1.0;
for the fnuz twins, "8-bit numerical formats for deep neural networks", arXiv 2206.02915.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from deepseek_mp.errors import FormatError
from deepseek_mp.precision.checks import find

Special = Literal["ieee", "fn", "fnuz", "all", "scale", "int"]


@dataclass(frozen=True, kw_only=True)
class Format:
    """A number format. Two formats are equal when their fields are."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    special: Special
    storage_bits: int
    """Bits a value takes in memory: tf32 and hf32 are arithmetic on values stored in 32 bits."""

    @property
    def is_float(self) -> bool:
        return self.special != "int"

    @property
    def bits(self) -> int:
        """Bits that carry the value: sign, exponent and mantissa."""
        sign = 0 if self.special == "scale" else 1
        return sign + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """Exponent bias: a stored exponent e means 2**(e - bias). Zero for integers."""
        if not self.is_float:
            return 0
        half: int = 2 ** (self.exponent_bits - 1)
        return half if self.special == "fnuz" else half - 1

    @property
    def max(self) -> float:
        """Largest finite value."""
        steps = 2**self.mantissa_bits
        if not self.is_float:
            return float(steps - 1)
        nan_exponent = self.special in ("ieee", "scale")
        exponent = 2**self.exponent_bits - 1 - nan_exponent - self.bias
        mantissa = steps - 2 if self.special == "fn" else steps - 1
        return float(2.0**exponent * (1 + mantissa / steps))

    @property
    def smallest_normal(self) -> float:
        """Smallest positive value with full precision; below it values lose bits."""
        if not self.is_float:
            return 1.0
        first_exponent = 0 if self.special == "scale" else 1
        return 2.0 ** (first_exponent - self.bias)

    @property
    def smallest_subnormal(self) -> float:
        """Smallest positive value."""
        return self.smallest_normal * self.epsilon

    @property
    def epsilon(self) -> float:
        """Distance from one to the next larger value."""
        return 2.0**-self.mantissa_bits if self.is_float else 1.0

    @property
    def has_inf(self) -> bool:
        """Whether an overflow becomes infinity; without it, it becomes NaN or the largest value."""
        return self.special == "ieee"

    @property
    def has_nan(self) -> bool:
        return self.special not in ("all", "int")

    @property
    def has_negative_zero(self) -> bool:
        return self.special in ("ieee", "fn", "all")

    def __str__(self) -> str:
        return self.name


def _float(name: str, exponent: int, mantissa: int, special: Special = "ieee", storage: int | None = None) -> Format:
    bits = 1 + exponent + mantissa if storage is None else storage
    return Format(name=name, exponent_bits=exponent, mantissa_bits=mantissa, special=special, storage_bits=bits)


FP64 = _float("fp64", 11, 52)
FP32 = _float("fp32", 8, 23)
TF32 = _float("tf32", 8, 10, storage=32)
HF32 = _float("hf32", 8, 11, storage=32)
BF16 = _float("bf16", 8, 7)
FP16 = _float("fp16", 5, 10)
FP8_E4M3 = _float("fp8_e4m3", 4, 3, "fn")
FP8_E5M2 = _float("fp8_e5m2", 5, 2)
FP8_E4M3FNUZ = _float("fp8_e4m3fnuz", 4, 3, "fnuz")
FP8_E5M2FNUZ = _float("fp8_e5m2fnuz", 5, 2, "fnuz")
FP4_E2M1 = _float("fp4_e2m1", 2, 1, "all")
E8M0 = Format(name="e8m0", exponent_bits=8, mantissa_bits=0, special="scale", storage_bits=8)
INT8 = Format(name="int8", exponent_bits=0, mantissa_bits=7, special="int", storage_bits=8)
INT4 = Format(name="int4", exponent_bits=0, mantissa_bits=3, special="int", storage_bits=4)

FORMATS: Mapping[str, Format] = MappingProxyType({
    f.name: f
    for f in (
        FP64, FP32, TF32, HF32, BF16, FP16, FP8_E4M3, FP8_E5M2, FP8_E4M3FNUZ, FP8_E5M2FNUZ,
        FP4_E2M1, E8M0, INT8, INT4,
    )
})  # fmt: skip


def find_format(name: str | Format) -> Format:
    """The format of that name, or the format itself; `FormatError` names the known ones."""
    return find("format", FORMATS, name, FormatError)
