"""Recorded calls whose kernels are launched early have the bits of those that wait for each other."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from deepseek_mp.backends.early_launch import can_launch_early
from deepseek_mp.inference import Form, Served, early_code
from deepseek_mp.ops import early_launch

DEVICE = torch.device("cuda")
CALLS = 200


class Block(nn.Module):
    """A decoder's block with a cache, and operations that load nothing."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(1024, 1024, bias=False) for _ in range(3))
        self.gate, self.up, self.down = nn.Linear(1024, 4096), nn.Linear(1024, 4096), nn.Linear(4096, 1024)
        self.norms = nn.ModuleList(nn.RMSNorm(1024) for _ in range(2))
        self.register_buffer("keys", torch.zeros(1, 8, 256, 128))
        self.register_buffer("values", torch.zeros(1, 8, 256, 128))

    def forward(self, x, position):
        normed = self.norms[0](x)
        query, key, value = (part(normed).view(1, -1, 8, 128).transpose(1, 2) for part in (self.q, self.k, self.v))
        self.keys.index_copy_(2, position, key)
        self.values.index_copy_(2, position, value)
        seen = torch.arange(256, device=x.device)[None, :] <= position[:, None]
        x = x + F.scaled_dot_product_attention(query, self.keys, self.values, attn_mask=seen).transpose(1, 2).flatten(2)
        normed = self.norms[1](x)
        marks = torch.zeros_like(x).index_fill(2, position, 1.0) + torch.ones(1024, device=x.device, dtype=x.dtype)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed)) * marks


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x, position):
        for block in self.blocks:
            x = block(x, position)
        return x


@pytest.fixture
def early():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if not can_launch_early(torch.device("cuda", 0)):
        pytest.skip("no device that launches kernels early (sm_90)")


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("kind", ["fp8_weights", "int8_weights", "int4_weights", "fp8", None])
def test_outputs_have_the_same_bits(early, monkeypatch, kind, compiled):
    torch.manual_seed(0)
    model = Decoder().to(DEVICE).eval()
    form = Form(format="bf16", linear=kind, compiled=compiled, graphed=True)
    inputs = [torch.randn(1, 1, 1024, device=DEVICE) for _ in range(CALLS)]
    places = torch.arange(CALLS, device=DEVICE)[:, None]
    found = []
    for is_early in (True, False):
        with monkeypatch.context() as patch:
            if not is_early:
                for module in (early_launch, early_code):
                    patch.setattr(module, "can_launch_early", lambda device: False)
            torch._dynamo.reset()
            served = Served(model, form, DEVICE)
            found.append(torch.stack([served(x, place) for x, place in zip(inputs, places, strict=True)]))
    assert found[0].isfinite().all()
    assert torch.equal(*found)
