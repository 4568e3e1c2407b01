"""Linear layers and embeddings whose weights are rounded in every forward, for formats that keep weights only.

They have the parameters of the layers that they replace, under the same names, so that a checkpoint of the model loads
into the plain one. They run on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deepseek_mp.ops.weight_only import rounded_by, scales_of
from deepseek_mp.qat.straight_through import learned_step, straight_through


class RoundedLayer(nn.Module):
    """What both kinds share: the format of the weight, and its steps where they are learned.

    A learned step is that of the largest magnitude times exp(log_step): so any optimizer moves it by shares of itself,
    it begins without clipping, and weight decay takes it back there.
    """

    weight: Tensor
    format: str
    log_step: nn.Parameter | None

    @torch.no_grad()
    def kept(self) -> tuple[Tensor, Tensor]:
        """q [N, K] and scale [N], what a deployed layer stores of the weight."""
        wide = self.weight.float()
        scale = scales_of(wide, self.format)
        scale = scale if self.log_step is None else scale * self.log_step.exp()
        return rounded_by(wide, scale, self.format), scale

    def _rounded(self, rows: Tensor, log_step: Tensor | None) -> Tensor:
        """Rows of the weight, rounded, with the logarithms that belong to them."""
        if log_step is None:
            return straight_through(rows, self.format)
        return learned_step(rows, scales_of(rows.detach(), self.format) * log_step.exp(), self.format)


class RoundedLinear(RoundedLayer, nn.Linear):
    """`nn.Linear` with its weight rounded by output channel."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        return F.linear(input, self._rounded(self.weight, self.log_step), self.bias)


class RoundedEmbedding(RoundedLayer, nn.Embedding):
    """`nn.Embedding` with its table rounded by row, as far as rows are looked up."""

    def forward(self, input: Tensor) -> Tensor:
        """[...] to [..., D]."""
        rows = nn.Embedding.forward(self, input).reshape(-1, self.embedding_dim)
        rounded = self._rounded(rows, None if self.log_step is None else self.log_step[input.flatten()])
        return rounded.view(*input.shape, self.embedding_dim)


def rounded(layer: nn.Linear | nn.Embedding, format: str, *, learn_step: bool) -> RoundedLayer:
    """A layer with the same parameters that rounds its weight.

    Args:
        layer: with its weight in FP32; of an embedding, `max_norm` None.
        format: 'int8' or 'fp8'.
        learn_step: give it steps of its own to learn, the parameter `log_step`; for integers.
    """
    made: RoundedLinear | RoundedEmbedding
    if isinstance(layer, nn.Linear):
        made = RoundedLinear(layer.in_features, layer.out_features, bias=False, device="meta")
        made.bias = layer.bias
    else:
        made = RoundedEmbedding(layer.num_embeddings, layer.embedding_dim, layer.padding_idx, device="meta")
        made.scale_grad_by_freq, made.sparse = layer.scale_grad_by_freq, layer.sparse
    made.weight, made.format = layer.weight, format
    made.register_parameter("log_step", nn.Parameter(layer.weight.new_zeros(len(layer.weight))) if learn_step else None)
    made.train(layer.training)
    return made


def rounded_layers(model: nn.Module) -> dict[str, RoundedLayer]:
    """Those of the model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoundedLayer)}
