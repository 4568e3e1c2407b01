"""The models the benchmarks train, their batches on the device, and their optimizers.

torchvision and transformers are needed only for the cases that use them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from decoder import Decoder, DecoderConfig, next_token_loss
from torch import Tensor, nn
from torch.optim import Optimizer

from deepseek_mp.workloads.data import library_windows
from deepseek_mp.workloads.detection_loss import detection_loss
from deepseek_mp.workloads.detector import TINY_DETECTOR, Detector, DetectorConfig
from deepseek_mp.workloads.gpt import GPTConfig, byte_gpt, next_byte_loss
from deepseek_mp.workloads.scenes import TINY_SCENES, SceneConfig, Scenes

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model to train: `model()` gives it with the same weights every time, on the device."""

    model: Callable[[], nn.Module]
    batches: list[Any]
    loss_fn: Callable[[Any, Any], Tensor] | None
    """None: the model's output has a `loss`."""
    optimizers: dict[str, OptimizerFactory]
    """The fastest on the device is used for everyone."""
    images: bool = False
    """Whether batches are images, whose memory format matters."""


def adamw(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def sgd_foreach(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, foreach=True)


def sgd_fused(parameters: Iterable[nn.Parameter]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9, fused=True)


def seeded(build: Callable[[], nn.Module], device: torch.device, *, seed: int = 0) -> Callable[[], nn.Module]:
    """`build` under a fixed seed, on the device from the start: billions of random numbers take a CPU long."""

    def model() -> nn.Module:
        torch.manual_seed(seed)
        with device:
            return build().to(device).train()

    return model


def cross_entropy(scores: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy in fp32, as the peers' loops compute it too."""
    return F.cross_entropy(scores.float(), target)


def resnet50(device: torch.device, *, small: bool) -> Case:
    """ResNet-50 of torchvision, random weights, random images of 224 x 224, batch 256."""
    import torchvision

    count, side = (4, 32) if small else (256, 224)
    images = [torch.randn(count, 3, side, side, device=device) for _ in range(2)]
    labels = torch.randint(0, 1000, (count,), device=device)
    return Case(
        model=seeded(torchvision.models.resnet50, device),
        batches=[(image, labels) for image in images],
        loss_fn=cross_entropy,
        optimizers={"sgd foreach": sgd_foreach, "sgd fused": sgd_fused},
        images=True,
    )


def detector(device: torch.device, *, small: bool) -> Case:
    """A detector of YOLO's shape, 12 million parameters, on scenes of 640 x 640, batch 64."""
    config, scenes = (TINY_DETECTOR, TINY_SCENES) if small else (DetectorConfig(), SceneConfig())
    data = Scenes(scenes, batch_size=2 if small else 64, count=2, seed=0, device=device)
    return Case(
        model=seeded(lambda: Detector(config), device),
        batches=list(data),
        loss_fn=detection_loss,
        optimizers={"adamw fused": adamw},
        images=True,
    )


class LanguageModel(nn.Module):
    """A language model of transformers that gives its logits: [B, T] token numbers to [B, T, V]."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.inner(input_ids=tokens).logits
        return logits


def bert_base(device: torch.device, *, small: bool) -> Case:
    """BERT-base of transformers with its masked-language head, random weights, 64 x 512 tokens."""
    from transformers import BertConfig, BertForMaskedLM

    count, length = (2, 32) if small else (64, 512)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2} if small else {}
    config = BertConfig(attn_implementation="sdpa", **sizes)
    tokens = [torch.randint(0, 30000, (count, length), device=device) for _ in range(2)]
    return Case(
        model=seeded(lambda: BertForMaskedLM(config), device),
        batches=[{"input_ids": ids, "labels": ids} for ids in tokens],
        loss_fn=None,
        optimizers={"adamw fused": adamw},
    )


def bert_base_with_loss(device: torch.device, *, small: bool) -> Case:
    """The same with its loss computed outside of the model, from logits."""
    case = bert_base(device, small=small)
    return replace(
        case,
        model=lambda: LanguageModel(case.model()),
        batches=[(batch["input_ids"], batch["labels"]) for batch in case.batches],
        loss_fn=next_token_loss,
    )


def decoder(device: torch.device, config: DecoderConfig, *, count: int, length: int) -> Case:
    """A decoder with random weights on `count` x `length` random tokens.

    So many batches that a short run sees none twice: a model that learns a few by heart amplifies every
    difference in rounding.
    """
    windows = [torch.randint(0, config.vocabulary, (count, length + 1), device=device) for _ in range(16)]
    return Case(
        model=seeded(lambda: Decoder(config), device),
        batches=[(window[:, :-1].contiguous(), window[:, 1:].contiguous()) for window in windows],
        loss_fn=next_token_loss,
        optimizers={"adamw fused": adamw},
    )


SMALL_DECODER = DecoderConfig(width=128, heads=2, hidden=256, layers=2, vocabulary=512)


def decoder_1b(device: torch.device, *, small: bool) -> Case:
    """1.3 billion parameters: 24 layers 2048 wide, 8 x 2048 tokens."""
    config = DecoderConfig(width=2048, heads=16, hidden=5632, layers=24)
    return (
        decoder(device, SMALL_DECODER, count=2, length=128) if small else decoder(device, config, count=8, length=2048)
    )


def decoder_8b_slice(device: torch.device, *, small: bool) -> Case:
    """Eight layers of the shape of a model of 8 billion parameters, 4 x 4096 tokens."""
    config = DecoderConfig(width=4096, heads=32, hidden=14336, layers=8)
    return (
        decoder(device, SMALL_DECODER, count=2, length=128) if small else decoder(device, config, count=4, length=4096)
    )


def demo_gpt(device: torch.device, *, small: bool) -> Case:
    """The byte-level GPT of the demo, on the standard library's text."""
    config = GPTConfig(width=32, layers=2, context=32) if small else GPTConfig()
    data = library_windows(batch_size=4 if small else 16, length=config.context, count=4)
    return Case(
        model=lambda: byte_gpt(config).to(device),
        batches=[(x.to(device), y.to(device)) for x, y in data.train],
        loss_fn=next_byte_loss,
        optimizers={"adamw fused": adamw},
    )


def large_matmuls(device: torch.device, *, small: bool) -> Case:
    """Four linear layers 2048 wide, batch 512: nearly all of a step is large matrix products."""
    width, count = (32, 8) if small else (2048, 512)
    return _perceptron(device, width=width, depth=4, count=count)


def many_tiny(device: torch.device, *, small: bool) -> Case:
    """Forty linear layers 24 wide, batch 16: a step is overhead, which every cast adds to."""
    return _perceptron(device, width=24, depth=4 if small else 40, count=16)


def _perceptron(device: torch.device, *, width: int, depth: int, count: int) -> Case:
    def build() -> nn.Module:
        layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.GELU())]
        return nn.Sequential(*layers, nn.Linear(width, 16))

    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(count, width, generator=generator).to(device), torch.arange(count, device=device) % 16)
        for _ in range(2)
    ]
    return Case(model=seeded(build, device), batches=batches, loss_fn=cross_entropy, optimizers={"adamw fused": adamw})
