"""Format names and PyTorch dtypes, each way.

tf32 and hf32 are ways to multiply fp32 tensors, so their tensors are fp32; the way back from a
dtype gives the format it stores.
"""

from __future__ import annotations

from types import MappingProxyType

import torch

from deepseek_mp.errors import FormatError, explain
from deepseek_mp.precision import find_format

DTYPES = MappingProxyType(
    {
        "fp64": torch.float64,
        "fp32": torch.float32,
        "tf32": torch.float32,
        "hf32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "fp8_e4m3": torch.float8_e4m3fn,
        "fp8_e5m2": torch.float8_e5m2,
        "fp8_e4m3fnuz": torch.float8_e4m3fnuz,
        "fp8_e5m2fnuz": torch.float8_e5m2fnuz,
        "e8m0": torch.float8_e8m0fnu,
        "int8": torch.int8,
    }
)
"""Formats that one element of a tensor can hold; the packed 4-bit ones are not among them."""
_STORED = {dtype: name for name, dtype in DTYPES.items() if name not in ("tf32", "hf32")}


def torch_dtype(format: str) -> torch.dtype:
    """The dtype whose elements hold values of `format`; `FormatError` when PyTorch has none."""
    name = find_format(format).name
    if name not in DTYPES:
        raise FormatError(
            explain(f"PyTorch has no dtype whose elements are {name}", ", ".join(DTYPES), "Use one of these formats")
        )
    return DTYPES[name]


def format_of(dtype: torch.dtype) -> str:
    """The format that a dtype stores; `FormatError` when it is in no format this package names."""
    if dtype not in _STORED:
        allowed = ", ".join(str(known) for known in _STORED)
        raise FormatError(explain(f"{dtype} stores no format of this package", allowed, "Convert the tensor first"))
    return _STORED[dtype]
