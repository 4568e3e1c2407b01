"""FP8 (E4M3) of one kind as the other, OCP's and AMD's fnuz: the same values, by other bytes and scales.

Both have four bits of exponent and three of mantissa. OCP's bias is 7, its largest value 448; 0x7F and 0xFF are NaN and
0x80 is minus zero. That of fnuz is 8, its largest value 240 (0x7F); 0x80 is NaN, and there is no minus zero. So every
other byte means in fnuz half of what it means in OCP's, subnormals included, and a scale makes up for it:

    OCP to fnuz    the same bytes, scales times 2; minus zero becomes zero, nothing else is lost
    fnuz to OCP    the same bytes, scales by 2, unless a row has +-240, whose byte is NaN there. Such a row keeps its
                   scale and is rounded by value: exact but for odd multiples of 2**-10 below 2**-6, to nearest even

Sources: OCP 8-bit floating point specification 1.0; arXiv 2206.02915 for fnuz.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from deepseek_mp.errors import ConfigError, ShapeError, explain

KINDS: Mapping[str, torch.dtype] = MappingProxyType({"ocp": torch.float8_e4m3fn, "fnuz": torch.float8_e4m3fnuz})
"""The two kinds, by name."""
_MINUS_ZERO = _FNUZ_NAN = 0x80
_OCP_NAN = 0x7F


def to_kind(q: Tensor, scale: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The bytes and scales whose q * scale[..., None] is the same in the other kind of FP8; see above what is lost.

    Args:
        q: [..., K] in float8_e4m3fn or float8_e4m3fnuz.
        scale: [...] in fp32, one for each row of q.
        kind: 'ocp' or 'fnuz'.

    Returns:
        q and scale of those shapes, new tensors; those passed where they are of that kind already.

    Raises:
        ConfigError: another kind, or a q of another dtype.
        ShapeError: scales that are not one for each row.
    """
    if kind not in KINDS or q.dtype not in KINDS.values():
        passed, allowed = f"{q.dtype} to be of the kind {kind!r}", "E4M3 tensors, and 'ocp' or 'fnuz'"
        raise ConfigError(explain(passed, allowed, "Convert other formats with cast"))
    if scale.shape != q.shape[:-1]:
        passed = f"scales {list(scale.shape)} for FP8 values {list(q.shape)}"
        raise ShapeError(explain(passed, "one for each row", "Pass those that the values were rounded with"))
    if q.dtype is KINDS[kind]:
        return q, scale
    return _to_fnuz(q, scale) if kind == "fnuz" else _to_ocp(q, scale)


def _to_fnuz(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    raw = q.view(torch.uint8)
    nan = (raw & 0x7F) == _OCP_NAN
    made = raw.masked_fill(raw == _MINUS_ZERO, 0).masked_fill_(nan, _FNUZ_NAN)
    return made.view(KINDS["fnuz"]), scale * 2


def _to_ocp(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    raw = q.view(torch.uint8)
    kept = raw.masked_fill(raw == _FNUZ_NAN, _OCP_NAN)
    rounded = q.float().to(KINDS["ocp"]).view(torch.uint8)
    has_largest = ((raw & 0x7F) == 0x7F).any(-1)
    made = torch.where(has_largest[..., None], rounded, kept)
    return made.view(KINDS["ocp"]), torch.where(has_largest, scale, scale / 2)
