"""Linear layers and embeddings that are rounded in every forward as a smaller format will store and multiply them.

They have the parameters of the layers that they replace, under the same names, so that a checkpoint of the model loads
into the plain one. They run on any device.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepseek_mp.ops.int4_linear import group_of, int4_weight
from deepseek_mp.ops.weight_only import rounded_by, scales_of
from deepseek_mp.qat.straight_through import (
    learned_group_step,
    learned_step,
    straight_through,
    straight_through_activations,
    straight_through_groups,
)

BY_ROW: Mapping[str, str] = MappingProxyType({"int8_weights": "int8", "fp8_weights": "fp8", "fp8": "fp8"})
"""Precisions whose weights have a scale for each row, and the format of `ops.weight_only` that they are stored in."""
TABLES: Mapping[str, str] = MappingProxyType(
    {"int8_weights": "int8_weights", "fp8_weights": "fp8_weights", "fp8": "fp8_weights", "int4_weights": "int8_weights"}
)
"""By precision of linear layers, that of embeddings: nothing is multiplied, and in 4 bits no table is stored."""


class RoundedLayer(nn.Module):
    """What all share: how the weight is stored, and its steps where they are learned.

    A learned step is that of the largest magnitude, or of the range, times exp(log_step): so any optimizer moves it by
    shares of itself, it begins without clipping, and weight decay takes it back there.
    """

    weight: Tensor
    precision: str
    """One of `TABLES`."""
    log_step: nn.Parameter | None

    @abstractmethod
    def kept(self) -> dict[str, Tensor]:
        """What a deployed layer stores of the weight, by name."""


class _ByRow(RoundedLayer):
    """With a step for each row."""

    @torch.no_grad()
    def kept(self) -> dict[str, Tensor]:
        wide, format = self.weight.float(), BY_ROW[self.precision]
        scale = scales_of(wide, format)
        scale = scale if self.log_step is None else scale * self.log_step.exp()
        return {"q": rounded_by(wide, scale, format), "scale": scale}

    def _rounded(self, rows: Tensor, log_step: Tensor | None) -> Tensor:
        """Rows of the weight, rounded, with the logarithms that belong to them."""
        format = BY_ROW[self.precision]
        if log_step is None:
            return straight_through(rows, format)
        return learned_step(rows, scales_of(rows.detach(), format) * log_step.exp(), format)


class RoundedLinear(_ByRow, nn.Linear):
    """`nn.Linear` with its weight rounded by output channel, and in 'fp8' its input by token."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        x = straight_through_activations(input) if self.precision == "fp8" else input
        return F.linear(x, self._rounded(self.weight, self.log_step), self.bias)


class GroupedLinear(RoundedLayer, nn.Linear):
    """`nn.Linear` with its weight in 4 bits, with a step for each group of a row."""

    @torch.no_grad()
    def kept(self) -> dict[str, Tensor]:
        factor = None if self.log_step is None else self.log_step.exp()
        q, scale, zero = int4_weight(self.weight, factor=factor)
        return {"q": q, "scale": scale, "zero": zero}

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        return F.linear(input, self.rounded_weight(), self.bias)

    def rounded_weight(self) -> Tensor:
        """[N, K], what the forward multiplies."""
        if self.log_step is None:
            return straight_through_groups(self.weight)
        return learned_group_step(self.weight, self.log_step.exp())


class RoundedEmbedding(_ByRow, nn.Embedding):
    """`nn.Embedding` with its table rounded by row, as far as rows are looked up."""

    def forward(self, input: Tensor) -> Tensor:
        """[...] to [..., D]."""
        rows = nn.Embedding.forward(self, input).reshape(-1, self.embedding_dim)
        rounded = self._rounded(rows, None if self.log_step is None else self.log_step[input.flatten()])
        return rounded.view(*input.shape, self.embedding_dim)


def rounded(layer: nn.Linear | nn.Embedding, precision: str, *, learn_step: bool) -> RoundedLayer:
    """A layer with the same parameters that is rounded.

    Args:
        layer: with its weight in FP32, of a width that the precision takes; of an embedding, `max_norm` None.
        precision: one of `TABLES`.
        learn_step: give it steps of its own to learn, the parameter `log_step`; for integers.
    """
    made: RoundedLinear | GroupedLinear | RoundedEmbedding
    if isinstance(layer, nn.Linear):
        kind = RoundedLinear if precision in BY_ROW else GroupedLinear
        made = kind(layer.in_features, layer.out_features, bias=False, device="meta")
        made.bias, made.precision = layer.bias, precision
    else:
        made = RoundedEmbedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
        made.scale_grad_by_freq, made.sparse = layer.scale_grad_by_freq, layer.sparse
        made.precision = TABLES[precision]
    made.weight = layer.weight
    steps = (len(layer.weight), *(() if made.precision in BY_ROW else (_groups(layer.weight),)))
    made.register_parameter("log_step", nn.Parameter(layer.weight.new_zeros(steps)) if learn_step else None)
    made.train(layer.training)
    return made


def _groups(weight: Tensor) -> int:
    """Of a row."""
    group = group_of(weight.shape[1])
    assert group is not None, "a layer of another width is left"
    return weight.shape[1] // group


def rounded_layers(model: nn.Module) -> dict[str, RoundedLayer]:
    """Those of the model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoundedLayer)}
