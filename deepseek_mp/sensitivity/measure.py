"""What a recipe does to the loss and to the gradients through one unit, from a sample of its tensors.

With rows of the input X [m, K] and of the gradient G [m, N] of the mean loss with respect to the output:

    dY       output in the recipe - output in FP32          [m, N]
    r_t      <G_t, dY_t>, added up over the rows of a term
    first    M/m sum_t r_t                                  expected change of the loss, first order
    second   M/m * c N/2 sum_t r_t^2                        second order: the Fisher information along dY

for M terms in the batch, N that the loss averages over, c the loss's curvature (`sampling.Terms`). That is the score of
NVIDIA's ModelOpt (`auto_quantize`, gradient mode) without its diagonal approximation of the Fisher information.

The gradient of a weight is a sum over terms, so batches scatter by about `energy`; rounding the two operands of wgrad
by eta_x and eta_g (error energies, as parts of the product's) adds (eta_x + eta_g) `row_energy`:

    energy      M/m sum_t |G_t|^2 |X_t|^2 , for terms of several rows |G_t^T X_t|^2
    row_energy  the same sum over rows
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from deepseek_mp.nn.unit import CONVOLUTIONS, original_class
from deepseek_mp.ops.rounding import rounded
from deepseek_mp.ops.statistics import (
    ERROR_FIELDS,
    SPREAD_FIELDS,
    Comparison,
    balanced,
    comparison,
    of_product,
    spread,
)
from deepseek_mp.precision import OPERANDS, Operand, Recipe, Role
from deepseek_mp.precision.recipe import OperandRecipe
from deepseek_mp.sensitivity.outputs import output_in, product_in, round_sample
from deepseek_mp.sensitivity.sampling import Sample, Terms

EFFECT_FIELDS = ("first", "variance", "second")
"""Of `effect`; `variance` is that of `first` over samples, one batch's worth."""
OPERAND_FIELDS = (*ERROR_FIELDS, "product")
"""Of an operand of a product: `ops.statistics.ERROR_FIELDS`, and what part of the product's energy its errors make,
where they are independent: sum_k e_k b_k / sum_k a_k b_k, with e and a the energies of errors and values along the sum
and b that of the other operand. What is lost counts by what it is multiplied with.
"""
RELATIVE, BY_ROW = ERROR_FIELDS.index("relative"), ERROR_FIELDS.index("by_row")
PRODUCT_OPERANDS: tuple[tuple[Role, Operand], ...] = tuple((role, side) for role in Role for side in OPERANDS[role])
"""The six operands, in the order of `operand_errors`."""
PLACES = tuple((number, number ^ 1) for number in range(len(PRODUCT_OPERANDS)))
"""The number of an operand, and of the other one of its product."""
ENERGY_FIELDS = ("energy", "row_energy")
TENSORS = (Operand.INPUT, Operand.WEIGHT, Operand.GRAD_OUTPUT)
AMAX = SPREAD_FIELDS.index("amax")
"""Its place in a row of `spreads`. Of several calls the largest counts, of all other fields the mean."""
_LEAST_FOR_VARIANCE = 2
WEIGHT_ROWS = 1024
"""Rows of a weight that are compared, where not all are."""
MOST_AT_ONCE = 2**25
"""Values that several ways to round them may be compared on at once; more do not fit everywhere."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was drawn of one call of a unit, in FP32: rows or items of its input and of the gradient of its output."""

    x: Tensor
    g: Tensor
    largest_x: Tensor
    """Largest magnitude of the whole input, []."""
    largest_g: Tensor
    sample: Sample
    terms: Terms


_Key = tuple[Operand, bool, OperandRecipe]
"""A tensor, whether it is read transposed, and how it is rounded."""


class Operands:
    """The tensors of a unit as its products read them, and each rounded: once, however many recipes and products ask.

    Without `both_ways` input and weight are rounded along the sum of fprop only, which stands for the other products,
    and of the weight some rows are compared.
    """

    def __init__(self, module: nn.Module, seen: Seen, *, both_ways: bool = True) -> None:
        self._is_linear = original_class(module) is nn.Linear
        self._both_ways = both_ways
        self._tensors = {Operand.INPUT: seen.x, Operand.GRAD_OUTPUT: seen.g, Operand.WEIGHT: _weight(module)}
        self._largest = {Operand.INPUT: seen.largest_x, Operand.GRAD_OUTPUT: seen.largest_g}
        self._nothing = seen.g.new_zeros(len(OPERAND_FIELDS), dtype=torch.float32)
        self._rounded: dict[tuple[Operand, bool, OperandRecipe], tuple[Tensor, Tensor]] = {}

    def rounded(self, which: Operand, side: OperandRecipe, *, turned: bool = False) -> tuple[Tensor, Tensor]:
        """A floating tensor as a matrix [outer, contraction], and the same rounded."""
        key = which, turned, side
        if key not in self._rounded:
            tensor = self._tensors[which]
            assert tensor is not None
            matrix = tensor.reshape(-1, tensor.shape[-1]) if self._is_linear else _items(tensor)
            matrix = matrix.t().contiguous() if turned else matrix
            whole = which in self._largest
            made = round_sample(matrix, side, self._largest[which]) if whole else rounded(matrix, side)
            self._rounded[key] = matrix, made
        return self._rounded[key]

    def errors(self, recipes: Sequence[Recipe]) -> list[Tensor]:
        """For each recipe `OPERAND_FIELDS` of the six operands [6, 8], in the order of `PRODUCT_OPERANDS`.

        All ways to round a tensor are compared with it at once: it is many small operations, for each of which the
        host takes longer than the device.
        """
        keys = [[self._way(recipe, role, which) for role, which in PRODUCT_OPERANDS] for recipe in recipes]
        ways: dict[tuple[Operand, bool], list[OperandRecipe]] = {}
        for which, turned, side in dict.fromkeys(key for row in keys for key in row if key is not None):
            ways.setdefault((which, turned), []).append(side)
        found = {
            (which, turned, side): compared
            for (which, turned), sides in ways.items()
            for side, compared in zip(sides, self._compared(which, turned, sides), strict=True)
        }
        shares = [self._shares(*place, keys, found) for place in PLACES]
        return [
            torch.stack(
                [
                    self._nothing if key is None else torch.cat([found[key].errors, shares[place][number]])
                    for place, key in enumerate(row)
                ]
            )
            for number, row in enumerate(keys)
        ]

    def _shares(
        self, place: int, other: int, keys: Sequence[Sequence[_Key | None]], found: Mapping[_Key, Comparison]
    ) -> dict[int, Tensor]:
        """What errors of the operand at a place are of its product, by number of the recipe, each [1]."""
        own = {number: row[place] for number, row in enumerate(keys)}
        read = {number: key for number, key in own.items() if key is not None}
        partner = next((row[other] for row in keys if row[other] is not None), None)
        if not read or partner is None or not self._is_linear:
            return {number: found[key].errors[RELATIVE, None] for number, key in read.items()}
        energies = torch.stack([self._along(PRODUCT_OPERANDS[place], key, found[key]) for key in read.values()])
        weight = self._along(PRODUCT_OPERANDS[other], partner, found[partner])[:, 1]
        count = max(1, min(energies.shape[1], len(weight)))  # of a weight's rows some are compared
        energies, weight = energies[:, :: -(-energies.shape[1] // count)], weight[:: -(-len(weight) // count)]
        return dict(zip(read, of_product(energies, weight).split(1), strict=True))

    def _along(self, place: tuple[Role, Operand], key: _Key, compared: Comparison) -> Tensor:
        """Energies along the axis that the product sums over, also where the tensor stands for itself turned."""
        return compared.columns if key[1] == (self._is_linear and _is_turned(*place)) else compared.rows

    def _way(self, recipe: Recipe, role: Role, which: Operand) -> _Key | None:
        """How the product reads the tensor; None for one that is not rounded."""
        side, tensor = recipe.operand(role, which), self._tensors[which]
        if tensor is None or not tensor.is_floating_point():
            return None
        turned = self._is_linear and side.is_scaled and _is_turned(role, which)
        return which, turned and (self._both_ways or which is Operand.GRAD_OUTPUT), side

    def _compared(self, which: Operand, turned: bool, sides: Sequence[OperandRecipe]) -> list[Comparison]:
        made = [self.rounded(which, side, turned=turned) for side in sides]
        matrix, rounded_ways = made[0][0], [one for _, one in made]
        if which is Operand.WEIGHT and not self._both_ways:
            every = max(1, matrix.shape[0] // WEIGHT_ROWS)
            matrix, rounded_ways = matrix[::every], [one[::every] for one in rounded_ways]
        at_once = max(1, MOST_AT_ONCE // max(1, matrix.numel()))
        parts = [rounded_ways[i : i + at_once] for i in range(0, len(rounded_ways), at_once)]
        found: list[Comparison] = []
        for part in map(torch.stack, parts):
            errors, rows, columns = comparison(matrix, part)
            if turned and which is Operand.GRAD_OUTPUT:
                errors[:, BY_ROW] = torch.maximum(errors[:, BY_ROW], balanced(self._by_input(columns)))
            found += map(Comparison, errors, rows, columns)
        return found

    def _by_input(self, tokens: Tensor) -> Tensor:
        """Energies of the output gradient by token [ways, T, 2], as the weight's has them by input: [ways, K, 2].

        Small tokens may lie beside large ones in every row that shares a scale. What is lost of them is lost to the
        inputs that nothing else has a value in, and nothing beside the large ones in others.
        """
        x = self._tensors[Operand.INPUT]
        if x is None or not x.is_floating_point():
            return tokens
        share = x.reshape(-1, x.shape[-1]).float().square()
        share = share / share.amax().clamp_min(torch.finfo(torch.float32).tiny)
        return torch.stack([part @ share for part in tokens.unbind(-1)], -1)


@torch.no_grad()
def effect(module: nn.Module, recipe: Recipe, exact: Tensor, seen: Seen, operands: Operands) -> Tensor:
    """`EFFECT_FIELDS` [3] of the recipe's fprop; `exact` is the output in FP32. Infinite where the output overflows."""
    sample, terms = seen.sample, seen.terms
    change = _output(module, recipe, seen, operands) - exact
    by_term = (seen.g * change).flatten(1).sum(1)
    # An infinite output has no finite effect, also where its gradient is zero.
    by_term = torch.where(by_term.isfinite(), by_term, float("inf"))
    drawn = by_term.numel()
    scale = sample.groups / max(drawn, 1)
    spread_of = by_term.var() if drawn >= _LEAST_FOR_VARIANCE else by_term.new_tensor(float("inf"))
    second = 0.5 * scale * terms.count * terms.curvature * by_term.square().sum()
    return torch.stack([scale * by_term.sum(), sample.groups**2 / max(drawn, 1) * spread_of, second])


def _output(module: nn.Module, recipe: Recipe, seen: Seen, operands: Operands) -> Tensor:
    """The sample's output in the recipe; a linear layer's of what was rounded already."""
    if original_class(module) is not nn.Linear:
        return output_in(module, seen.x, recipe, seen.largest_x)
    x = operands.rounded(Operand.INPUT, recipe.fprop.left)[1].view(seen.x.shape)
    return product_in(module, x, operands.rounded(Operand.WEIGHT, recipe.fprop.right)[1], recipe)


@torch.no_grad()
def energies(module: nn.Module, seen: Seen) -> Tensor:
    """`ENERGY_FIELDS` [2]; zeros for a unit without products of its own, or whose weight is not trained."""
    kind, x, g, sample = original_class(module), seen.x, seen.g, seen.sample
    weight = module._parameters.get("weight")  # noqa: SLF001
    if weight is not None and not weight.requires_grad:
        return x.new_zeros(len(ENERGY_FIELDS), dtype=torch.float32)
    scale = sample.groups / max(x.shape[0], 1)
    if kind is nn.Linear:
        by_row = (g.square().sum(-1) * x.square().sum(-1)).sum()
        if sample.by_row:
            return torch.stack([by_row, by_row]) * scale
        by_item = sum((_rows(a).t() @ _rows(b)).square().sum() for a, b in zip(g, x, strict=True))
        return torch.stack([torch.as_tensor(by_item, device=x.device), by_row]) * scale
    if kind in _CONVOLVE and not isinstance(module.padding, str) and module.padding_mode == "zeros":
        return _convolution_energies(module, x, g) * scale
    return x.new_zeros(len(ENERGY_FIELDS), dtype=torch.float32)


@torch.no_grad()
def spreads(module: nn.Module, seen: Seen) -> Tensor:
    """`SPREAD_FIELDS` of input, weight and output gradient [3, 6], in the order of `TENSORS`.

    `amax` is that of the whole tensors: few draws have the largest value. The rest is that of what was drawn.
    """
    tensors = (seen.x, _weight(module), seen.g)
    nothing = seen.g.new_zeros(len(SPREAD_FIELDS), dtype=torch.float32)
    found = torch.stack([nothing if t is None or not t.is_floating_point() else spread(t) for t in tensors])
    for which, largest in ((Operand.INPUT, seen.largest_x), (Operand.GRAD_OUTPUT, seen.largest_g)):
        found[TENSORS.index(which), AMAX] = largest
    return found


def _is_turned(role: Role, which: Operand) -> bool:
    """Whether the product reads the tensor transposed (`precision.roles`)."""
    return role is Role.WGRAD or (role is Role.DGRAD and which is Operand.WEIGHT)


def _items(x: Tensor) -> Tensor:
    return x.flatten(1) if x.dim() > 1 else x[:, None]


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _weight(module: nn.Module) -> Tensor | None:
    weight = module._parameters.get("weight")  # noqa: SLF001
    return None if weight is None else weight.detach().float()


_CONVOLVE: dict[type[nn.Module], tuple[Any, Any]] = {
    nn.Conv1d: (F.conv1d, conv1d_weight),
    nn.Conv2d: (F.conv2d, conv2d_weight),
    nn.Conv3d: (F.conv3d, conv3d_weight),
}
assert CONVOLUTIONS.issuperset(_CONVOLVE)


def _convolution_energies(module: Any, x: Tensor, g: Tensor) -> Tensor:
    """Those of the items of a convolution, not scaled up yet."""
    convolve, weight_gradient = _CONVOLVE[original_class(module)]
    where = module.stride, module.padding, module.dilation
    by_item = x.new_zeros(())
    for item, gradient in zip(x.split(1), g.split(1), strict=True):
        by_item += weight_gradient(item, module.weight.shape, gradient, *where, module.groups).square().sum()
    # Energy of the window behind every output: squares added up over channels and over the kernel.
    ones = x.new_ones((1, 1, *module.kernel_size))
    windows = convolve(x.square().sum(1, keepdim=True), ones, None, *where) / module.groups
    return torch.stack([by_item, (windows * g.square().sum(1, keepdim=True)).sum()])
