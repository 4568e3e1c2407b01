"""Each format against the set of values its codes can hold, as torch or the bit masks list them."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_mp.errors import FormatError
from deepseek_mp.precision import FORMATS, Format, find_format

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
    "fp8_e4m3fnuz": torch.float8_e4m3fnuz,
    "fp8_e5m2fnuz": torch.float8_e5m2fnuz,
    "e8m0": torch.float8_e8m0fnu,
    "int8": torch.int8,
}
KEPT_BITS = {"tf32": 19, "hf32": 20}
FP4_MAGNITUDES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
PAGE = Path(__file__).parents[2] / "docs" / "precision.md"


def all_values(name: str) -> Tensor:
    """The value of every code of the format, in float64."""
    if name == "fp4_e2m1":
        return torch.tensor(FP4_MAGNITUDES + [-value for value in FP4_MAGNITUDES], dtype=torch.float64)
    if name == "int4":
        return torch.arange(-8, 8, dtype=torch.float64)
    if name in KEPT_BITS:  # the codes of fp32 whose low mantissa bits are zero
        codes = torch.arange(2 ** KEPT_BITS[name]) << (32 - KEPT_BITS[name])
        return codes.to(torch.int32).view(torch.float32).to(torch.float64)
    dtype = DTYPES[name]
    codes = torch.arange(2 ** (8 * dtype.itemsize)).to(torch.int16 if dtype.itemsize == 2 else torch.uint8)
    return codes.view(dtype).to(torch.float64)


@pytest.mark.parametrize("name", [*DTYPES, *KEPT_BITS, "fp4_e2m1", "int4"])
def test_format_describes_exactly_the_values_of_its_codes(name: str) -> None:
    format, values = FORMATS[name], all_values(name)
    positive = values[torch.isfinite(values) & (values > 0)].sort().values
    steps = positive.diff()
    full_precision = positive[:-1][steps == format.epsilon * positive[:-1]] if format.is_float else positive

    assert len(values) == 2**format.bits
    assert format.max == positive[-1]
    assert format.smallest_subnormal == positive[0]
    assert format.smallest_normal == full_precision[0]
    assert format.epsilon == steps[positive[:-1] == 1.0].item()
    assert format.has_inf == torch.isinf(values).any()
    assert format.has_nan == torch.isnan(values).any()
    assert format.has_negative_zero == ((values == 0) & torch.signbit(values)).any()


@pytest.mark.parametrize("name", [*DTYPES, "fp32", "fp64"])
def test_storage_is_what_torch_uses(name: str) -> None:
    dtype = {**DTYPES, "fp32": torch.float32, "fp64": torch.float64}[name]
    assert FORMATS[name].storage_bits == FORMATS[name].bits == 8 * dtype.itemsize


@pytest.mark.parametrize("name", KEPT_BITS)
def test_reduced_fp32_is_stored_in_32_bits(name: str) -> None:
    assert (FORMATS[name].bits, FORMATS[name].storage_bits) == (KEPT_BITS[name], 32)


def test_fp32_agrees_with_torch() -> None:
    format, info = FORMATS["fp32"], torch.finfo(torch.float32)
    above_zero = torch.nextafter(torch.tensor(0.0), torch.tensor(1.0))
    assert (format.max, format.smallest_normal, format.epsilon) == (info.max, info.smallest_normal, info.eps)
    assert format.smallest_subnormal == above_zero.item()


def test_fp64_agrees_with_python() -> None:
    format, info = FORMATS["fp64"], sys.float_info
    assert (format.max, format.smallest_normal, format.epsilon) == (info.max, info.min, info.epsilon)
    assert format.smallest_subnormal == math.ulp(0.0) == 5e-324


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2"])
def test_the_fnuz_twin_reads_the_same_byte_as_half(name: str) -> None:
    ocp, twin = all_values(name), all_values(f"{name}fnuz")
    shared = torch.isfinite(ocp) & torch.isfinite(twin) & (ocp != 0)
    assert shared.sum() > 240
    assert torch.equal(twin[shared], ocp[shared] / 2)
    assert FORMATS[f"{name}fnuz"].bias == FORMATS[name].bias + 1


def test_names_are_the_keys_and_values_are_distinct() -> None:
    assert all(format.name == str(format) == name for name, format in FORMATS.items())
    assert len(set(FORMATS.values())) == len(FORMATS) == 14


def test_find_takes_a_name_or_a_format() -> None:
    own = Format(name="fp6_e3m2", exponent_bits=3, mantissa_bits=2, special="all", storage_bits=6)
    assert find_format("bf16") is FORMATS["bf16"]
    assert find_format(own) is own
    assert own.max == 28.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("BF16", r"^unknown format 'BF16'\. Allowed: fp64, .*int4\. Use one of these names\. Did you mean 'bf16'\?$"),
        ("zz", r"^unknown format 'zz'\. Allowed: fp64, .*int4\. Use one of these names\.$"),
        (16, r"^unknown format 16\."),
        (["bf16"], r"^unknown format \['bf16'\]\."),
        (None, r"^unknown format None\."),
    ],
)
def test_find_refuses_other_values(name: str, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        find_format(name)


def table_row(format: Format) -> str:
    """The format's row in docs/precision.md."""
    special = {"inf": format.has_inf, "NaN": format.has_nan, "-0": format.has_negative_zero}
    widths = (format.bits, format.exponent_bits, format.mantissa_bits, format.storage_bits)
    numbers = (format.max, format.smallest_normal, format.smallest_subnormal, format.epsilon)
    cells = [f"`{format}`", *map(str, widths), *(f"{number:.5g}" for number in numbers)]
    cells.append(", ".join(name for name, present in special.items() if present) or "none")
    return f"| {' | '.join(cells)} |"


def test_the_table_of_the_documentation_is_true() -> None:
    table = PAGE.read_text(encoding="utf-8").partition("| format |")[2].partition("\n\n")[0]
    assert table.splitlines()[2:] == [table_row(format) for format in FORMATS.values()]
