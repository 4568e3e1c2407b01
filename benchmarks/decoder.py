"""A decoder of today's shape, for the benchmarks: RMSNorm, causal attention, gated feed-forward (SwiGLU)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_mp.nn import computes_cross_entropy

VOCABULARY = 32000


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes: `width` of the stream, `hidden` of the feed-forward layer."""

    width: int
    heads: int
    hidden: int
    layers: int
    vocabulary: int = VOCABULARY


class Block(nn.Module):
    """Attention, then the gated layer, each after a norm and around a shortcut: [B, T, width] to the same."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden
        self.heads = config.heads
        self.norm1 = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm2 = nn.RMSNorm(width)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, stream: Tensor) -> Tensor:
        stream = stream + self.attention(self.norm1(stream))
        normed = self.norm2(stream)
        update: Tensor = self.down(F.silu(self.gate(normed)) * self.up(normed))
        return stream + update

    def attention(self, normed: Tensor) -> Tensor:
        batch, length, width = normed.shape
        heads = self.qkv(normed).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        update: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return update


class Decoder(nn.Module):
    """[B, T] token numbers (int64) to [B, T, vocabulary] scores of the next token."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.embedding(tokens)
        for block in self.blocks:
            stream = block(stream)
        scores: Tensor = self.head(self.norm(stream))
        return scores


@computes_cross_entropy()
def next_token_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy in nats, computed in fp32: scores [B, T, vocabulary], target [B, T] int64."""
    return F.cross_entropy(scores.flatten(0, 1).float(), target.flatten())
