"""Names and dtypes agree with PyTorch, each way."""

from __future__ import annotations

import pytest
import torch

from deepseek_mp.errors import FormatError
from deepseek_mp.ops.dtypes import DTYPES, format_of, torch_dtype
from deepseek_mp.precision import FORMATS

STORED = [name for name in DTYPES if name not in ("tf32", "hf32")]
FLOATING = [name for name in STORED if FORMATS[name].is_float and name != "e8m0"]


@pytest.mark.parametrize("name", STORED)
def test_there_and_back(name: str) -> None:
    assert format_of(torch_dtype(name)) == name


@pytest.mark.parametrize("name", ["tf32", "hf32"])
def test_arithmetic_on_fp32_is_stored_in_fp32(name: str) -> None:
    assert torch_dtype(name) is torch.float32
    assert format_of(torch_dtype(name)) == "fp32"


@pytest.mark.parametrize("name", FLOATING)
def test_a_format_computes_what_pytorch_knows_of_its_dtype(name: str) -> None:
    format, info = FORMATS[name], torch.finfo(torch_dtype(name))
    assert (format.max, format.smallest_normal, format.storage_bits) == (info.max, info.tiny, info.bits)
    if name != "fp8_e5m2fnuz":  # PyTorch says 0.125, but the value after 1 is 1.25
        assert format.epsilon == info.eps


def test_every_format_has_a_dtype_but_the_packed_ones() -> None:
    assert set(FORMATS) - set(DTYPES) == {"int4", "fp4_e2m1"}


@pytest.mark.parametrize("name", ["int4", "fp4_e2m1"])
def test_a_packed_format_has_no_dtype(name: str) -> None:
    with pytest.raises(FormatError, match=f"no dtype whose elements are {name}"):
        torch_dtype(name)


def test_an_unknown_name_is_an_error() -> None:
    with pytest.raises(FormatError, match="unknown format 'float16'"):
        torch_dtype("float16")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_dtype_outside_the_vocabulary_is_an_error(dtype: torch.dtype) -> None:
    with pytest.raises(FormatError, match=f"{dtype} stores no format of this package"):
        format_of(dtype)
