"""The models that the inference benchmark serves, with their inputs and arms.

torchvision and transformers are needed only for the cases that use them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from cached_decoder import CachedConfig, CachedDecoder, GPTSlice
from inference_arms import Arm, peers, quantised
from torch import Tensor, nn

from deepseek_mp.inference import Form

CACHE, PROMPT = 1024, 512
Made = tuple[nn.Module, tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model to serve. `make(device, small)` gives it on the device, in evaluation, and its inputs."""

    make: Callable[[torch.device, bool], Made]
    arms: tuple[Arm, ...]
    limit: int
    """Seconds for all of it, unless others are asked for."""
    needs: str = ""
    """The package that it needs."""


def decoder_7b(device: torch.device, small: bool, *, cached: bool) -> Made:
    """A decoder of 7 billion weights in BF16: one token behind 1023 others, or a prompt of 512."""
    length = PROMPT if not small else 16
    config = CachedConfig(width=256, heads=4, hidden=512, layers=2, vocabulary=512, positions=length, cached=cached)
    if not small:
        config = CachedConfig(width=4096, heads=32, hidden=11008, layers=32, vocabulary=32000,
                              positions=CACHE if cached else PROMPT, cached=cached)  # fmt: skip
    model = made_in_bf16(lambda: CachedDecoder(config), device)
    count = 1 if cached else length
    tokens = torch.randint(0, config.vocabulary, (1, count), device=device)
    return model, (tokens, torch.arange(config.positions - count, config.positions, device=device))


def gpt3_slice(device: torch.device, small: bool, *, tokens: int) -> Made:
    """Two of the 96 blocks of GPT-3 (Brown et al., 2020, arXiv:2005.14165) with weights in BF16."""
    width, heads, hidden = (256, 4, 1024) if small else (12288, 96, 49152)
    model = made_in_bf16(lambda: GPTSlice(width, heads, hidden, layers=2), device)
    return model, (torch.randn(1, min(tokens, 16) if small else tokens, width, device=device),)


def bert_base(device: torch.device, small: bool, *, batch: int) -> Made:
    """BERT-base of transformers with its masked-language head, random weights, sequences of 128 tokens."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2} if small else {}
    with device:
        inner = BertForMaskedLM(BertConfig(attn_implementation="sdpa", **sizes))
    tokens = torch.randint(0, 30000, (min(batch, 2) if small else batch, 16 if small else 128), device=device)
    return Logits(inner).to(device).eval(), (tokens,)


class Logits(nn.Module):
    """A language model of transformers that gives its logits: [B, T] token numbers to [B, T, V]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.inner(input_ids=tokens).logits
        return logits


def resnet50(device: torch.device, small: bool, *, batch: int) -> Made:
    """ResNet-50 of torchvision, random weights, random images of 224 x 224, like those its BatchNorms have seen."""
    import torchvision

    with device:
        model = torchvision.models.resnet50()
    side, count = (32, 2) if small else (224, 32)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # one batch is all that its statistics are of; without, outputs explode
    with torch.no_grad():
        model.train()(torch.randn(count, 3, side, side, device=device))
    return model.to(device).eval(), (torch.randn(min(batch, 2) if small else batch, 3, side, side, device=device),)


def made_in_bf16(build: Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """`build` with its weights in BF16 on the device from the start: billions of random numbers take a CPU long."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            return build().eval()
    finally:
        torch.set_default_dtype(before)


# What a target compares comes first, since building may run out of time; code is compiled once for launches and graphs.
_DECODER = (
    *peers("fp32", "bf16", "bf16+graphed"),
    *quantised(compiled=False),
    *peers("bf16+compiled+graphed", "bf16+compiled"),
    *quantised(compiled=True),
    *peers("tf32", "bf16+torchao_int8+compiled+graphed"),
)
_GPT3 = (
    *peers("fp32", "tf32", "bf16"),
    Arm(form=Form(format="bf16", graphed=True)),
    *quantised(compiled=False),
    *peers("bf16+compiled", "bf16+compiled+graphed"),
    *quantised(compiled=True),
)
_EAGER = peers("fp32", "tf32", "bf16")
_CODE = peers("bf16+compiled", "fp16+compiled")
_BERT = (
    *_EAGER,
    *peers("bf16+compiled+graphed", "fp16+compiled+graphed"),
    Arm(chosen=True),
    *_CODE,
    *peers("bf16+max-autotune+graphed"),
)
_RESNET = (
    *_EAGER,
    *peers("bf16+channels_last+compiled+graphed", "fp16+channels_last+compiled+graphed"),
    Arm(chosen=True),
    *_CODE,
    *peers("bf16+channels_last+max-autotune+graphed"),
)

CASES = {
    "decoder-7b-token": Case(make=partial(decoder_7b, cached=True), arms=_DECODER, limit=100),
    "decoder-7b-prefill": Case(make=partial(decoder_7b, cached=False), arms=_DECODER, limit=85),
    "gpt3-slice-prefill": Case(make=partial(gpt3_slice, tokens=PROMPT), arms=_GPT3, limit=45),
    "gpt3-slice-token": Case(make=partial(gpt3_slice, tokens=1), arms=_GPT3, limit=45),
    **{
        f"bert-base-{size}": Case(make=partial(bert_base, batch=size), arms=_BERT, limit=50, needs="transformers")
        for size in (1, 64)
    },
    **{
        f"resnet50-{size}": Case(make=partial(resnet50, batch=size), arms=_RESNET, limit=55, needs="torchvision")
        for size in (1, 64)
    },
}
