"""A byte-level GPT: a causal language model whose vocabulary is the 256 bytes.

Pre-norm transformer blocks, all alike and kept in one `ModuleList`, so that a compiler can compile
one block and use it for all. Attention is `scaled_dot_product_attention`, which picks the best
kernel for the device and format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepseek_mp.errors import ConfigError, explain
from deepseek_mp.nn.known_loss import computes_cross_entropy

VOCABULARY = 256


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes of the model. The defaults (3.2 million parameters) suit a CPU."""

    width: int = 256
    heads: int = 4
    layers: int = 4
    context: int = 128
    """Longest sequence, in bytes."""
    tied: bool = True
    """Use the embedding's weight as the head's weight too."""

    def __post_init__(self) -> None:
        if min(self.width, self.heads, self.layers, self.context) < 1 or self.width % self.heads:
            raise ConfigError(
                explain(
                    f"width={self.width}, heads={self.heads}, layers={self.layers}, context={self.context}",
                    "positive sizes, with width a multiple of heads",
                    "Change the sizes",
                )
            )


class Block(nn.Module):
    """Causal attention, then a feed-forward layer, each around a shortcut: [B, T, width] to the same."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.norm1(hidden))
        update: Tensor = self.down(F.gelu(self.up(self.norm2(hidden))))
        return hidden + update

    def attention(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        heads = self.qkv(hidden).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        update: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return update


class ByteGPT(nn.Module):
    """[B, T] byte values (int64, T <= context) to [B, T, 256] scores of the next byte."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks:
            # 2 * layers updates are summed into one stream: keep its variance that of one (GPT-2).
            assert isinstance(block, Block)
            for last in (block.out, block.down):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * config.layers))
        if config.tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        hidden = self.embedding(tokens) + self.position(positions)
        for block in self.blocks:
            hidden = block(hidden)
        scores: Tensor = self.head(self.norm(hidden))
        return scores


@computes_cross_entropy()
def next_byte_loss(scores: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy in nats, computed in fp32: scores [B, T, 256], target [B, T] int64."""
    return F.cross_entropy(scores.flatten(0, 1).float(), target.flatten())


def byte_gpt(config: GPTConfig | None = None, *, seed: int = 0) -> ByteGPT:
    """The model with weights drawn from `seed`; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return ByteGPT(config or GPTConfig())
