"""Decoders for the benchmarks of inference: one with a static cache of keys and values, and blocks of GPT-3's shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class CachedConfig:
    """Sizes: `width` of the stream, `hidden` of the gated layer, `positions` that a sequence has at most."""

    width: int
    heads: int
    hidden: int
    layers: int
    vocabulary: int
    positions: int
    cached: bool
    """One token at a time, with the keys and values of those before it in buffers; else whole sequences."""


class Attention(nn.Module):
    """[1, T, width] to the same, with rotary positions. With a cache T is 1, and the token sees all up to its own."""

    keys: Tensor
    values: Tensor

    def __init__(self, config: CachedConfig) -> None:
        super().__init__()
        self.heads, self.cached = config.heads, config.cached
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        if config.cached:
            shape = (1, config.heads, config.positions, config.width // config.heads)
            self.register_buffer("keys", torch.randn(shape), persistent=False)
            self.register_buffer("values", torch.randn(shape), persistent=False)

    def forward(self, normed: Tensor, rotation: tuple[Tensor, Tensor], at: Tensor, seen: Tensor | None) -> Tensor:
        """Attend.

        Args:
            normed: [1, T, width].
            rotation: cosines and sines of the positions, [T, width / heads / 2] each.
            at: [T] int64, the positions.
            seen: with a cache, [1, 1, 1, positions] bool.
        """
        batch, length, width = normed.shape
        heads = self.qkv(normed).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = rotated(query, *rotation), rotated(key, *rotation)
        if self.cached:
            self.keys.index_copy_(2, at, key)
            self.values.index_copy_(2, at, value)
            mixed = F.scaled_dot_product_attention(query, self.keys, self.values, attn_mask=seen)
        else:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        update: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return update


class Block(nn.Module):
    """Attention, then the gated layer (SwiGLU), each after an RMSNorm and around a shortcut."""

    def __init__(self, config: CachedConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden
        self.norm1, self.attention = nn.RMSNorm(width, eps=1e-6), Attention(config)
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, stream: Tensor, rotation: tuple[Tensor, Tensor], at: Tensor, seen: Tensor | None) -> Tensor:
        stream = stream + self.attention(self.norm1(stream), rotation, at, seen)
        normed = self.norm2(stream)
        update: Tensor = self.down(F.silu(self.gate(normed)) * self.up(normed))
        return stream + update


class CachedDecoder(nn.Module):
    """[1, T] token numbers and their positions [T], int64, to [1, T, vocabulary] scores of the next token."""

    def __init__(self, config: CachedConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        half = config.width // config.heads // 2
        rates = 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = torch.arange(config.positions, dtype=torch.float32)[:, None] * rates
        dtype = self.head.weight.dtype  # the tables are rounded, not the angles
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)
        self.cached = config.cached

    def forward(self, tokens: Tensor, at: Tensor) -> Tensor:
        stream = self.embedding(tokens)
        rotation = self.cos[at], self.sin[at]
        seen = (torch.arange(len(self.cos), device=at.device) <= at)[None, None, None] if self.cached else None
        for block in self.blocks:
            stream = block(stream, rotation, at, seen)
        scores: Tensor = self.head(self.norm(stream))
        return scores


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021, arXiv:2104.09864), halves paired: [..., T, D] with tables of [T, D / 2]."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


class GPTBlock(nn.Module):
    """A block of GPT-3's shape: causal attention and a GELU layer, with biases, after LayerNorms."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, stream: Tensor) -> Tensor:
        batch, length, width = stream.shape
        heads = self.qkv(self.norm1(stream)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        update: Tensor = self.down(F.gelu(self.up(self.norm2(stream)), approximate="tanh"))
        return stream + update


class GPTSlice(nn.Module):
    """Some blocks and the last norm: a stream [1, T, width] to one that a head would read."""

    def __init__(self, width: int, heads: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(GPTBlock(width, heads, hidden) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, stream: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.blocks(stream))
        return normed
