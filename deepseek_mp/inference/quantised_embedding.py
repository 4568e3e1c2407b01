"""An embedding whose table is kept in 8 bits, in the place of a served copy's own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from deepseek_mp.inference.stored_layer import StoredLayer


class QuantisedEmbedding(StoredLayer):
    """`nn.Embedding` for inference, its table in 8 bits with a scale for each row.

    Args:
        q, scale: as `ops.weight_only.quantised_weight` gives them; buffers.
        dtype: of what it gives.
    """

    q: Tensor
    scale: Tensor

    def __init__(self, q: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = q.shape
        self.dtype = dtype
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)

    def forward(self, input: Tensor) -> Tensor:
        """Indices [...] to rows [..., D]."""
        scale = F.embedding(input, self.scale[:, None])  # which refuses indices below 0, as `nn.Embedding` does
        return (self.q[input].float() * scale).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, weights={self.q.dtype}"
