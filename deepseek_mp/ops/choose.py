"""Which implementation of an op a device runs, chosen once when a plan is applied.

The order is native, triton, reference. The reference runs everywhere; where it is all there is, a
product is emulated. A device without FP8 units emulates too, although some libraries (CPU, XPU) have
scaled products there. A user may name the implementation; then it is that one or an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from deepseek_mp.backends.capabilities import UNKNOWN, Capabilities, table
from deepseek_mp.errors import ConfigError, FormatError, explain
from deepseek_mp.ops.layouts import PAIRS
from deepseek_mp.ops.operands import Cast, Operands

log = logging.getLogger("deepseek_mp")

IMPLEMENTATIONS = {
    "quantise": ("triton", "reference"),
    "made": ("triton", "reference"),
    "product": ("native", "triton", "reference"),
    "row_sums": ("triton", "reference"),
    "cross_entropy": ("triton", "reference"),
    "non_finite": ("triton", "reference"),
    "packing": ("triton", "reference"),
    "max_pool": ("triton", "reference"),
    "weight_only": ("native", "triton", "reference"),
    "fp8_linear": ("native", "reference"),
    "row_cast": ("triton",),
    "int4_linear": ("native", "triton", "reference"),
    "few_query_attention": ("triton", "reference"),
}
"""By op, the preferred first; "made" are the casts that compute their tensor themselves."""
_NATIVE_NAMES = {
    ("tensor", "tensor"): "tensorwise",
    ("row", "row"): "rowwise",
    ("1x128", "128x128"): "1x128@128x128",
    ("1x128", "1x128"): "1x128@1x128",
}
"""What the capability table calls a pair of granularities."""
_BLOCKS_SINCE_CUDA = (12, 9)

Quantise = Callable[[Tensor, Cast, Tensor | None], Operands]
"""Of a tensor, how it is cast, and the seed where it is rounded stochastically."""
QuantiseDelayed = Callable[[Tensor, Tensor, Tensor, Cast], Operands]
Product = Callable[[Tensor, Tensor, Tensor, Tensor, tuple[str, str], Tensor | None, torch.dtype], Tensor]
RowSums = Callable[[Tensor, Tensor], Tensor]
"""Of a matrix [M, K], and of it rounded in one way or several."""
WeightOnly = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Of x [M, K], a weight [N, K] in 8 bits, its scales [N], and a bias [N]."""
Int4Linear = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""Of x [M, K], a weight in 4 bits with its scales and zeros, and a bias [N]."""
FewQueryAttention = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
"""Of queries, keys and values by head, a mask, and the scale of the scores."""
CrossEntropy = Callable[[Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor | None]]
"""Of logits [R, V], labels [R], smoothing, and factors [R] for a gradient."""
Granularities = Sequence[str] | Sequence[tuple[str, str]]
"""Names for quantise, pairs (left, right) for product."""


def choose(op: str, granularities: Granularities, device: Capabilities, kernels: str | None = None) -> str:
    """The implementation of `op` for all these granularities on this device.

    Args:
        op: 'quantise' or 'product'.
        granularities: names for quantise, pairs (left, right) for product.
        device: what the device can do.
        kernels: the implementation the user asks for, or None.

    Raises:
        ConfigError: there is no implementation of that name.
        FormatError: the device does not run the one asked for; the message says why.
    """
    known = IMPLEMENTATIONS[op]
    if kernels is None:
        if not _has_units(device):
            return "reference"
        return next(name for name in known if why_not(name, granularities, device) is None)
    if kernels not in known:
        raise ConfigError(explain(f"kernels={kernels!r} for {op}", ", ".join(known), "Use one of these, or None"))
    reason = why_not(kernels, granularities, device)
    if reason is None:
        return kernels
    possible = [name for name in known if why_not(name, granularities, device) is None]
    raise FormatError(explain(f"kernels={kernels!r} for {op}: {reason}", ", ".join(possible), "Use one of these"))


def why_not(name: str, granularities: Granularities, device: Capabilities) -> str | None:
    """Why the device does not run this implementation; None if it does."""
    if name == "reference":
        return None
    if name == "triton":
        return _why_not_triton(granularities, device)
    for pair in granularities:
        if isinstance(pair, str) or _NATIVE_NAMES.get(pair, "") not in _native(device):
            return f"the libraries of {device.device_name} have no product of {' with '.join(pair)} scales"
    return None


def _native(device: Capabilities) -> frozenset[str]:
    """Names of the scaled products that the device's libraries have in this build of PyTorch."""
    if device.id == UNKNOWN:
        return frozenset()
    found = frozenset(table()[device.id].get("scaled_mm", ()))
    version = torch.version.cuda
    if device.vendor == "nvidia" and version is not None:
        major, minor = map(int, version.split(".")[:2])
        if (major, minor) < _BLOCKS_SINCE_CUDA:
            found = frozenset(name for name in found if "128" not in name)
    return found


def _has_units(device: Capabilities) -> bool:
    """Whether the device multiplies some kind of FP8 itself."""
    return any(name.startswith("fp8") for name in device.matmul_formats)


def _why_not_triton(granularities: Granularities, device: Capabilities) -> str | None:
    if device.backend not in ("cuda", "rocm"):
        return f"Triton has no code for {device.device_name}"
    if not _has_units(device):
        return f"{device.device_name} has no FP8 units"
    missing = [" with ".join(pair) for pair in granularities if not isinstance(pair, str) and pair not in PAIRS]
    if missing:
        return f"there is no kernel for products of {', '.join(missing)} scales"
    return None if _has_triton() else "the package triton is not installed"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def quantise_of(name: str) -> Quantise:
    """The function behind an implementation's name."""
    run: Quantise = _module("quantise", name).quantise
    return run


def quantise_delayed_of(name: str) -> QuantiseDelayed:
    """The function behind an implementation's name; what runs `quantise` runs this op too."""
    run: QuantiseDelayed = _module("quantise", name).quantise_delayed
    return run


def made_of(op: str, name: str) -> Callable[..., Any]:
    """The function behind an implementation's name, for an op of `ops.schema_made`; its arguments differ by op."""
    run: Callable[..., Any] = getattr(_module("made", name), op)
    return run


def row_sums_of(name: str) -> RowSums:
    """The function behind an implementation's name."""
    run: RowSums = _module("row_sums", name).row_sums
    return run


def cross_entropy_of(name: str) -> CrossEntropy:
    """The function behind an implementation's name."""
    run: CrossEntropy = _module("cross_entropy", name).cross_entropy_rows
    return run


def non_finite_of(name: str) -> Callable[[Tensor], Tensor]:
    """The function behind an implementation's name, of a tensor whose infinities and NaN are counted."""
    run: Callable[[Tensor], Tensor] = _module("non_finite", name).non_finite
    return run


def kernel_runs(device: torch.device, what: str, once: Callable[[], object]) -> bool:
    """Whether a kernel can be compiled and run there; for one that is only faster, without which nothing is missing.

    Args:
        what: what runs without it, for the warning.
        once: runs it.
    """
    if not has_kernels(device):
        return False
    try:
        once()
    except Exception as error:  # noqa: BLE001 - no compiler, an old device: whatever it is, the reference runs
        log.warning("%s: without a kernel on %s: %s: %s", what, device, type(error).__name__, error)
        return False
    return True


def packing_of(op: str, name: str) -> Callable[..., Tensor]:
    """The function behind an implementation's name, for a function of `ops.packing`; its arguments differ by op."""
    run: Callable[..., Tensor] = getattr(_module("packing", name), op)
    return run


def max_pool_of(op: str, name: str) -> Callable[..., Any]:
    """The function behind an implementation's name, for an op of `ops.max_pool`; its arguments differ by op."""
    run: Callable[..., Any] = getattr(_module("max_pool", name), op)
    return run


def weight_only_of(name: str) -> WeightOnly:
    """The function behind an implementation's name."""
    run: WeightOnly = _module("weight_only", name).weight_only_linear
    return run


def fp8_linear_of(name: str) -> WeightOnly:
    """The function behind an implementation's name; its operands are those of `weight_only_of`."""
    run: WeightOnly = _module("fp8_linear", name).fp8_linear
    return run


def row_cast_of(name: str) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The function behind an implementation's name, of a matrix whose rows are cast to FP8."""
    run: Callable[[Tensor], tuple[Tensor, Tensor]] = _module("row_cast", name).row_cast
    return run


def int4_linear_of(name: str) -> Int4Linear:
    """The function behind an implementation's name."""
    run: Int4Linear = _module("int4_linear", name).int4_linear
    return run


def few_query_attention_of(name: str) -> FewQueryAttention:
    """The function behind an implementation's name."""
    run: FewQueryAttention = _module("few_query_attention", name).few_query_attention
    return run


def has_kernels(device: torch.device) -> bool:
    """Whether Triton has code for the device, whatever it multiplies."""
    return device.type == "cuda" and _has_triton()


def product_of(name: str) -> Product:
    """The function behind an implementation's name."""
    run: Product = _module("product", name).product
    return run


@cache
def _module(op: str, name: str) -> ModuleType:
    """The module that implements an op; Triton is imported when it is first needed."""
    if name not in IMPLEMENTATIONS[op]:
        allowed = ", ".join(IMPLEMENTATIONS[op])
        raise ConfigError(explain(f"implementation {name!r} of {op}", allowed, "Use one of these"))
    return import_module(f"deepseek_mp.ops.{name}.{op}")
