"""The numbers of one sampled tensor: what its values are like, and what rounding does to them. All on the device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from deepseek_mp.ops.rounding import rounded
from deepseek_mp.ops.statistics import ERROR_FIELDS, SPREAD_FIELDS, rounding_error, spread
from deepseek_mp.precision import Rounding
from deepseek_mp.precision.recipe import OperandRecipe

WIDTH = max(len(SPREAD_FIELDS), len(ERROR_FIELDS))
"""Numbers of a row of a block; zeros stand behind what has fewer."""
_generators: dict[torch.device, torch.Generator] = {}


def block(rows: Tensor, ways: Sequence[OperandRecipe], largest: Callable[[], Tensor]) -> Tensor:
    """Numbers [1 + ways, WIDTH] of rows [n, width]: `SPREAD_FIELDS`, then `ERROR_FIELDS` of each way of rounding.

    `largest` gives the largest magnitude of the whole tensor; it is asked where a way has one scale for all of it.
    """
    rows = rows.float()
    lines = F.pad(spread(rows)[None], (0, WIDTH - len(SPREAD_FIELDS)))
    if not rows.numel() or not ways:
        return F.pad(lines, (0, 0, 0, len(ways)))
    found = rounding_error(rows, torch.stack([_rounded(rows, side, largest) for side in ways]))
    found = found.nan_to_num_(0.0)  # squares beyond FP32's range: a NaN would stay in a mean for good
    return torch.cat([lines, F.pad(found, (0, WIDTH - len(ERROR_FIELDS)))])


def _rounded(rows: Tensor, side: OperandRecipe, largest: Callable[[], Tensor]) -> Tensor:
    generator = _own_generator(rows.device) if side.rounding == Rounding.STOCHASTIC else None
    if not side.is_scaled or side.granularity.rows is not None:
        return rounded(rows, side, generator=generator)
    # A row beside the sampled ones brings the largest value of those that were not.
    top = F.pad(largest().view(1, 1), (0, rows.shape[1] - 1))
    return rounded(torch.cat([rows, top]), side, generator=generator)[:-1]


def largest_magnitude(x: Tensor) -> Tensor:
    """The largest magnitude of a tensor, FP32 []; 0 if it has an infinity or NaN, or nothing."""
    if not x.numel():
        return torch.zeros((), device=x.device)
    found = torch.linalg.vector_norm(x, float("inf")).float()
    return torch.where(found.isfinite(), found, 0.0)


def _own_generator(device: torch.device) -> torch.Generator:
    """Random numbers that take none from those of the model."""
    if device not in _generators:
        _generators[device] = torch.Generator(device)
    return _generators[device]
