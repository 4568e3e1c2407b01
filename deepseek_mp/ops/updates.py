"""What becomes of a weight's update when the weight is stored in BF16: a few numbers, left on the device.

With w the weight, dw its update and w' = bf16(w), an update arrives as dw_eff = stored(w' + dw) - w', where `stored`
rounds to nearest, by chance, or keeps what it lacks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_mp.ops.grid import spacing
from deepseek_mp.ops.stored import joined, random_bits, round_by_bits, split
from deepseek_mp.precision import FORMATS

_SMALLEST = torch.finfo(torch.float32).tiny
FATE_FIELDS = ("lost", "edq", "edq_sr", "edq_kahan", "psi", "ratio")
"""What `update_fate` gives; NaN where no update is other than zero.

lost       share of dw other than zero with bf16(w' + dw) = w': below half the distance between neighbours
edq        <dw_eff, dw> / |dw|^2 for rounding to nearest, 1 if nothing is lost ("Collage", arXiv 2405.03637)
edq_sr     the same for one stochastic rounding: 1 but for its noise
edq_kahan  the same for a weight that is kept in two BF16 tensors, from the weight as these hold it
psi        mean((w' + dw - below) (above - w' - dw)) over the noise in dw. The mean is the variance that stochastic
           rounding adds, with the BF16 neighbours below and above: |dw| ulp(w) for small dw. The noise is mean(dw^2)
           times the share of it that changes from step to step
ratio      |dw| / |w|
"""


@torch.no_grad()
def kept_by_nearest(weight: Tensor, update: Tensor) -> Tensor:
    """The update as it arrives in a weight that is rounded to the nearest BF16 value, of their shape.

    Args:
        weight: fp32; rounded to BF16 first.
        update: fp32.
    """
    stored = weight.bfloat16().float()
    return (stored + update).bfloat16().float() - stored


@torch.no_grad()
def lost_share(kept: Tensor, update: Tensor) -> Tensor:
    """Share of the updates other than zero that became zero, fp32 []."""
    moved = update != 0
    return (moved & (kept == 0)).sum() / moved.sum()


@torch.no_grad()
def effective_quality(kept: Tensor, update: Tensor) -> Tensor:
    """EDQ, <kept, update> / |update|^2, fp32 []."""
    # In units of the largest update, whose square may be no FP32 number.
    top = update.abs().amax()
    part = update / top
    return (kept / top * part).sum() / part.square().sum()


@torch.no_grad()
def update_fate(weight: Tensor, update: Tensor, *, noise_fraction: float = 1.0, seed: int = 0) -> Tensor:
    """`FATE_FIELDS` [6] of a weight and what an optimizer adds to it, fp32 of one shape, whole or sampled rows.

    Args:
        weight: before the update, as exact as it is known.
        update: as computed, before anything rounds it.
        noise_fraction: share of mean(update^2) that is noise of the batch: 1 for small batches. Less makes `psi`
            larger.
        seed: of the stochastic rounding that `edq_sr` tries.

    Returns:
        fp32 [6] on the device of the weight; nothing waits for it.
    """
    if not update.numel():
        return torch.full((len(FATE_FIELDS),), float("nan"), device=update.device)
    stored = weight.bfloat16().float()
    nearest = kept_by_nearest(weight, update)
    wanted = stored + update
    bits = random_bits([update.numel()], [0], [0], seed=seed, device=update.device)[0]
    held = joined(*split(weight))
    return torch.stack([
        lost_share(nearest, update),
        effective_quality(nearest, update),
        effective_quality(round_by_bits(wanted, bits).float() - stored, update),
        effective_quality(joined(*split(held + update)) - held, update),
        _added_noise(stored, update) / noise_fraction,
        torch.linalg.vector_norm(update) / torch.linalg.vector_norm(weight),
    ])  # fmt: skip


def _added_noise(stored: Tensor, update: Tensor) -> Tensor:
    """Variance of stochastic rounding over mean(update^2), fp32 []."""
    # Nothing is added beside weights that small, whose spacing is subnormal: zero, and no divisor, on some devices.
    step = spacing(stored, FORMATS["bf16"]).clamp_min_(_SMALLEST)
    # Distance from the neighbour below in units of the spacing; the neighbours are equally far apart on both sides of
    # a weight but at powers of two.
    part = update / step
    part = part - part.floor()
    top = update.abs().amax()
    variance = (part * (1 - part)) * (step / top).square()
    return variance.mean() / (update / top).square().mean()
