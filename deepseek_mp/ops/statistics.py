"""What the values of a tensor are like, and what rounding does to them: a few numbers, left on the device.

Every function gives one FP32 vector whose places are named beside it, so that a caller can keep many in one
buffer and read them together, when it suits. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_mp.ops.choose import kernel_runs, row_sums_of
from deepseek_mp.precision import Format

ERROR_FIELDS = ("relative", "by_row", "bias", "underflow", "overflow", "mass", "lean")
"""What `rounding_error` gives.

relative   error energy over energy, sum (q - x)^2 / sum x^2; the noise-to-signal ratio of the format
by_row     the mean of the same ratio over the rows: sees what happens to rows of small values, which `relative`
           does not
bias       the mean of (q - x) / x, cut to [-1, 1]: errors that do not cancel in a sum. Sees what happens to small
           values between large ones in a row
underflow  share of the values other than zero that become zero
overflow   share of the finite values that become infinite or NaN
mass       change of the sum of magnitudes, sum |q| / sum |x| - 1: `bias` weighted by magnitude, so that values count by
           what they do to a sum. Rounding to the nearest loses about `relative` of it
lean       how far the errors of a row lean to one side: with the mean m of (q - x) / |x|, cut to [-1, 1], in a row, the
           root of the mean of m^2 over the rows, less what chance could make. Where positive and negative values lose
           alike it is 0; where a row's small values are all of one sign, as in the gradient of a softmax, it is the
           share of them that become zero. A row of few large and many small values shows neither in `by_row` nor in
           `mass`
"""
ROW_FIELDS = (
    "error",
    "energy",
    "ratio",
    "ratio_square",
    "side",
    "nonzero",
    "underflow",
    "overflow",
    "finite",
    "size",
    "rounded_size",
)
"""Sums over a row of x, which rounding makes q, both finite where nothing else is said: (q - x)^2, x^2;
r = (q - x) / x cut to [-1, 1], its square, r with the sign of x; how many x are not zero, and how many of them become
zero; how many finite x become infinite or NaN; how many x are finite; |x|, |q|.
"""
_ENERGIES = 2
"""Fields of a row that are energies: the first ones."""
ROUNDING_TAKES = 1.5
"""Times the relative error of a format, at most, that rounding to the nearest takes of `mass`."""
_LEAN = ERROR_FIELDS.index("lean")
SURE = 2.0
"""Standard errors that `lean` is lowered by."""
SPREAD_FIELDS = ("amax", "rms", "smallest", "octaves", "kurtosis", "non_finite")
"""What `spread` gives, of the finite values.

amax        largest magnitude
rms         root of the mean square
smallest    smallest magnitude other than zero; 0 if there is none
octaves     log2(amax / smallest): the powers of two that a format would have to span
kurtosis    mean x^4 / (mean x^2)^2: 3 for normal values, far more with outliers
non_finite  share of all values that are infinite or NaN
"""


def ideal_error(format: Format) -> float:
    """The relative error energy of normally distributed values in the format's range, rounded to the nearest.

    With m mantissa bits, the steps from 2^k to 2^(k+1) are 2^(k-m), and errors spread evenly over one: 4^-m / 12 times
    the mean of 4^k over that of x^2, which is 0.54 for normal values wherever they lie between powers of two. That is
    0.045 / 4^m, and a little less of few bits. Integers have steps of one size, so it says nothing of them.
    """
    return 0.044 * 4.0**-format.mantissa_bits


class Comparison(NamedTuple):
    """A matrix and it rounded, in one way or [ways, ...] in several."""

    errors: Tensor
    """`ERROR_FIELDS` [7]."""
    rows: Tensor
    """Energies of errors and of values [rows, 2], and by column."""
    columns: Tensor


@torch.no_grad()
def rounding_error(x: Tensor, rounded: Tensor) -> Tensor:
    """`ERROR_FIELDS` [7] of a matrix [rows, columns] and the same matrix rounded; 0 where nothing can be said.

    Rounded in several ways [ways, rows, columns] it gives [ways, 7], by as many operations as one.

    Values of `x` that are not finite are left out. Values that rounding makes infinite count in `overflow` only.
    """
    return _errors(row_sums(x, rounded))


@torch.no_grad()
def comparison(x: Tensor, rounded: Tensor) -> Comparison:
    """A matrix [rows, columns] beside it rounded in several ways [ways, rows, columns]; what is not finite is left out.

    The rows are summed up once for both.
    """
    sums = row_sums(x, rounded)
    return Comparison(errors=_errors(sums), rows=sums[..., :_ENERGIES], columns=_column_energies(x, rounded))


def _errors(sums: Tensor) -> Tensor:
    """`rounding_error` of `ROW_FIELDS` [..., rows, 11]."""
    by_row = dict(zip(ROW_FIELDS, sums.unbind(-1), strict=True))
    whole = dict(zip(ROW_FIELDS, sums.sum(-2).unbind(-1), strict=True))
    # The mean over pairs of different values of a row: a square of a mean has the mean of squares in it.
    sides, pairs = by_row["side"].square() - by_row["ratio_square"], by_row["nonzero"] * (by_row["nonzero"] - 1)
    # Side by side, so that one division makes all shares.
    per_row = _quotient(torch.stack([by_row["error"], sides]), torch.stack([by_row["energy"], pairs])).sum(-1)
    counted = torch.stack([(by_row["energy"] > 0).sum(-1), (pairs > 0).sum(-1)])
    parts = [
        whole["error"],
        per_row[0],
        whole["ratio"],
        whole["underflow"],
        whole["overflow"],
        whole["rounded_size"] - whole["size"],
        per_row[1],
    ]
    wholes = [
        whole["energy"],
        counted[0],
        whole["nonzero"],
        whole["nonzero"],
        whole["finite"],
        whole["size"],
        counted[1],
    ]
    found = _quotient(_line(parts), _line(wholes))
    # Chance is as likely to lift the estimate as to lower it: it must be above zero by more than that.
    scatter = _quotient(by_row["ratio_square"], pairs).square().sum(-1).mul(2.0).sqrt() / counted[1].clamp_min(1)
    found[..., _LEAN].sub_(SURE * scatter).clamp_(min=0).sqrt_()
    return found


def _column_energies(x: Tensor, rounded: Tensor) -> Tensor:
    """`Comparison.columns`."""
    if _kernel_runs(x.device):
        return row_sums(x.t(), rounded.transpose(1, 2))[..., :_ENERGIES]
    x, rounded = x.float(), rounded.float()
    dropped = ~((x.abs() < float("inf")) & (rounded.abs() < float("inf")))
    both = (rounded - x).masked_fill_(dropped, 0.0), x.masked_fill(dropped, 0.0)
    return torch.stack([part.square_().sum(1) for part in both], -1)


def balanced(energies: Tensor) -> Tensor:
    """The mean of error energy over energy along an axis [..., n, 2], of what has energy."""
    error, energy = energies.unbind(-1)
    return _quotient(_quotient(error, energy).sum(-1), (energy > 0).sum(-1))


def of_product(energies: Tensor, partner: Tensor) -> Tensor:
    """What errors of one operand are of a product's energy, if they are independent.

    Args:
        energies: [..., n, 2], error and energy of the operand along the axis that is summed over.
        partner: [n], energy of the other operand along it.
    """
    weight = _quotient(partner, partner.amax())
    return _quotient((energies[..., 0] * weight).sum(-1), (energies[..., 1] * weight).sum(-1))


def row_sums(x: Tensor, rounded: Tensor) -> Tensor:
    """`ROW_FIELDS` [..., rows, 11] of a matrix [rows, columns] and of it rounded, [rows, columns] or several."""
    kernel = x.is_floating_point() and x.dtype == rounded.dtype and _kernel_runs(x.device)
    return row_sums_of("triton" if kernel else "reference")(x, rounded)


@cache
def _kernel_runs(device: torch.device) -> bool:
    def once() -> None:
        row_sums_of("triton")(torch.ones(1, 1, device=device), torch.ones(1, 1, 1, device=device))

    return kernel_runs(device, "statistics of rounding", once)


@torch.no_grad()
def spread(x: Tensor) -> Tensor:
    """`SPREAD_FIELDS` [6] of a tensor of any shape; zeros for an empty one."""
    if not x.numel():
        return torch.zeros(len(SPREAD_FIELDS), device=x.device)
    size = x.float().abs()
    finite = size < float("inf")
    count = finite.sum()
    size.masked_fill_(~finite, 0.0)
    amax = size.amax()
    # In units of the largest value, so that fourth powers neither overflow nor vanish.
    square = _quotient(size, amax).square()
    mean_square, mean_fourth = _quotient(_line([square.sum(), square.square().sum()]), count.float()).unbind()
    smallest = size.masked_fill_(size == 0, float("inf")).amin()
    smallest.masked_fill_(smallest == float("inf"), 0.0)
    octaves, kurtosis = _quotient(_line([amax, mean_fourth]), _line([smallest, mean_square.square()])).unbind()
    return _line(
        [
            amax,
            mean_square.sqrt() * amax,
            smallest,
            octaves.clamp_min(1.0).log2(),
            kurtosis,
            1 - count / x.numel(),
        ]
    )


def _quotient(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole, 0 where whole is 0."""
    return (part / whole).masked_fill_(whole == 0, 0.0)


def _line(numbers: Sequence[Tensor]) -> Tensor:
    """The numbers side by side, as FP32."""
    return torch.stack([number.float() for number in numbers], dim=-1)
