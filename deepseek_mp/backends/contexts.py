"""The two regions that change how PyTorch computes: `autocast` and `math_mode`. Both restore what they found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch

from deepseek_mp.backends.base import Backend
from deepseek_mp.backends.capabilities import UNKNOWN
from deepseek_mp.backends.detect import Device, as_device, backend_for, capabilities
from deepseek_mp.backends.open_regions import OpenRegions
from deepseek_mp.errors import FormatError, explain
from deepseek_mp.precision import find_format

AUTOCAST_DTYPE = {"bf16": torch.bfloat16, "fp16": torch.float16}
FULL = frozenset({"fp64", "fp32", "tf32", "hf32"})
"""Formats whose operands are stored at full width: autocast is off in their regions."""
Fp32Mode = Literal["ieee", "tf32", "hf32"]
_OPEN = OpenRegions()


def autocast(device: Device, format: str, *, cache: bool = False) -> AbstractContextManager[Any]:
    """A region whose matrix products run in `format`: bf16 or fp16 cast, the full-width formats do not.

    `torch.autocast` warns and runs FP32 when the device type cannot run the dtype; here that is a
    `FormatError`. Its cache of cast weights is off unless asked for: with it, weights changed inside
    the region are not seen. Whether the device has units for the format is `Capabilities.require`'s
    question, and what FP32 itself means inside is `math_mode`'s.
    """
    where = as_device(device)
    if find_format(format).name in FULL:
        if not torch.amp.is_autocast_available(where.type):
            return nullcontext()
        return torch.autocast(where.type, enabled=False, cache_enabled=cache)
    usable = backend_for(where).autocast_formats(where) & AUTOCAST_DTYPE.keys()
    if format not in usable:
        allowed = ", ".join(sorted(usable | {"fp32"}))
        change = f"Use one of these on {where.type!r}, or another device"
        raise FormatError(explain(f"torch.autocast cannot run {format} on device {str(where)!r}", allowed, change))
    return torch.autocast(where.type, dtype=AUTOCAST_DTYPE[format], cache_enabled=cache)


def math_mode(device: Device, *, fp32: Fp32Mode, search: bool) -> AbstractContextManager[None]:
    """A region in which FP32 products are really `fp32`, with the library's algorithm search on or off.

    Libraries have defaults of their own: cuDNN convolutions run in TF32, Ascend convolutions in
    HF32. `ieee` turns all of these off, `tf32` and `hf32` turn one on for matrix products,
    convolutions and RNNs alike, and are a `FormatError` on a device without it. `search` is cuDNN's
    and MIOpen's timing of algorithms (`cudnn.benchmark`); other libraries have none. Costs some
    microseconds; state is the process's, as in PyTorch itself. Threads in regions of one mode do not
    disturb each other; of several modes the one that was entered last holds for all.
    """
    backend = backend_for(device)
    if fp32 not in ("ieee", "tf32", "hf32"):
        passed = f"fp32={fp32!r} is no way to compute FP32"
        raise FormatError(explain(passed, "'ieee', 'tf32', 'hf32'", "Use one of these"))
    if fp32 != "ieee":
        capabilities(device).require(fp32, emulate=False)
    return _OPEN.region((backend.name, fp32, search), lambda: _math_mode(backend, fp32, search))


def fp32_mode(device: Device, product: Literal["matmul", "conv", "rnn"]) -> str:
    """How FP32 products of that kind are computed on the device right now: ieee, tf32, hf32 or bf16.

    A flag alone says little: cuDNN's reads TF32 on a GPU whose units have none, and oneDNN's BF16
    does nothing on a CPU without AMX; FP32 runs then.
    """
    where = as_device(device)
    backend = backend_for(where)
    mode = backend.fp32_mode(product)
    if mode == "ieee" or not backend.is_available():
        return mode
    found = capabilities(where)
    effective = mode in found.matmul_formats and found.fast_fp32.removesuffix("-optin") == mode
    return mode if effective or found.id == UNKNOWN else "ieee"


@contextmanager
def _math_mode(backend: Backend, fp32: str, search: bool) -> Iterator[None]:
    with backend.fp32_math(fp32), backend.algorithm_search(search):
        yield
