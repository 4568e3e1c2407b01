"""`int4_linear` as PyTorch's `_weight_int4pack_mm`: on CPUs, and on NVIDIA GPUs since Ampere.

On a GPU it gives each 16 rows of x a pass over the weight, so that it is for few rows. The library reads weights in an
order of the device, and scale and zero beside each other; it rounds the sum to BF16, the bias comes after that.
(pytorch: aten/src/ATen/native/cuda/int4mm.cu and native/cpu/int4mm_kernel.h say what they take.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.ops.reference.int4_linear import MIDDLE, packed, unpacked

_CHANNELS = {"cpu": 16, "cuda": 8}
_INNER = {128: 8, 64: 4, 32: 2}
"""Tiles of 16 weights along a row that lie together, by the weights of a group: a row has whole ones."""
_AT_ONCE = 1024
"""Columns of the weight that are read back at once."""


def multiple_of_channels(device: torch.device) -> int | None:
    """What the number of output channels is to be a multiple of; None: there is no product on such devices."""
    return _CHANNELS.get(device.type)


def prepared(q: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor, None]:
    """What `ops.int4_linear.int4_weight` gave, in the library's order: codes, and [K / group, N, 2] of scale and zero.

    Raises:
        ConfigError: a number of channels that the library does not take, or another device.
    """
    kind, multiple = q.device.type, multiple_of_channels(q.device)
    if multiple is None or len(q) % multiple:
        passed = f"a native product of {len(q)} channels in 4 bits on {q.device}"
        allowed = ", ".join(f"multiples of {each} on {name}" for name, each in _CHANNELS.items())
        raise ConfigError(explain(passed, allowed, "Use 'triton' or 'reference'"))
    codes = unpacked(q, len(scale)).flatten(1)
    if kind == "cpu":
        made = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)  # noqa: SLF001
    else:
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        made = torch.ops.aten._convert_weight_to_int4pack(pairs, _INNER[codes.shape[1] // len(scale)])  # noqa: SLF001
    return made, torch.stack([scale, zero], dim=2), None


def unprepared(q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `prepared` was given: the codes are read off products with unit vectors."""
    groups, channels, _ = scale.shape
    width = q.numel() * q.element_size() * 2 // channels
    plain = torch.stack([torch.ones_like(scale[..., 0]), torch.zeros_like(scale[..., 1])], dim=2)
    codes = q.new_empty((channels, width), dtype=torch.uint8)
    for start in range(0, width, _AT_ONCE):
        count = min(_AT_ONCE, width - start)
        unit = torch.zeros((count, width), dtype=torch.bfloat16, device=q.device)
        unit.diagonal(start).fill_(1)
        codes[:, start : start + count] = (_product(unit, q, plain) + MIDDLE).t()
    return packed(codes.view(channels, groups, -1)), scale[..., 0].contiguous(), scale[..., 1].contiguous()


@torch.no_grad()
def int4_linear(x: Tensor, q: Tensor, scale: Tensor, _zero: Tensor | None, bias: Tensor | None) -> Tensor:
    """See `ops.int4_linear.int4_linear`. `ConfigError` for operands that the library does not take."""
    if x.dtype is not torch.bfloat16 or x.device.type not in _CHANNELS:
        passed = f"a native product of {x.dtype} in 4 bits on {x.device}"
        raise ConfigError(explain(passed, "bf16 on a CPU or an NVIDIA GPU", "Use 'reference'"))
    out = _product(x.contiguous(), q, scale) if len(x) else x.new_empty((0, scale.shape[1]))
    return out if bias is None else (out.float() + bias).to(x.dtype)


def _product(x: Tensor, q: Tensor, scale: Tensor) -> Tensor:
    group = x.shape[1] // len(scale)
    aten = torch.ops.aten
    run = aten._weight_int4pack_mm_for_cpu if x.device.type == "cpu" else aten._weight_int4pack_mm  # noqa: SLF001
    out: Tensor = run(x, q, group, scale)
    return out
