"""Random models of layers, sums, regions, views and state: in INT8 they give what they give while they are trained."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deepseek_mp.qat import Int8Model, convert, prepare

WIDTH, STEPS = 8, (4, 9)
ALIKE = 0.03
"""Norm of what compiled and other sums may differ by, relative: a value at the edge goes to the other integer."""
ROUNDED = 0.2
"""The same of what INT8 itself does to so few values."""

Earlier = Tensor
Body = nn.Module | None


def frozen(x: Tensor, earlier: Earlier, body: nn.Module) -> Tensor:
    with torch.no_grad():
        y = body(earlier)
    return x + y


def in_16_bits(x: Tensor, _: Earlier, body: nn.Module) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = body(x)
    return x + y


def in_fp32(x: Tensor, _: Earlier, body: nn.Module) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return body(x)


def in_place(x: Tensor, earlier: Earlier, _: Body) -> Tensor:
    x = x * 2
    x += earlier
    return x


Step = Callable[[Tensor, Earlier, nn.Module], Tensor]
OF_LAYERS: list[Step] = [
    lambda x, _, body: body(x),
    lambda x, _, body: x + body(x),
    lambda x, _, body: torch.add(x, body(x), alpha=0.5),
    frozen,
    in_16_bits,
    in_fp32,
]
WITHOUT: list[Step] = [
    lambda x, earlier, _: x + earlier,
    lambda x, earlier, _: torch.add(x, earlier, alpha=-1.5),
    lambda x, earlier, _: torch.sub(x, earlier, alpha=2),
    lambda x, earlier, _: x + earlier.detach(),
    lambda x, _1, _2: x + x,
    lambda x, _1, _2: x + x.mean(0, keepdim=True),
    lambda x, earlier, _: x + earlier[:1].expand_as(x),
    lambda x, earlier, _: x.masked_fill(earlier > 1, 0.0),
    lambda x, earlier, _: torch.where(earlier > 0, x, earlier),
    lambda x, earlier, _: torch.cat([x, earlier], 1)[:, ::2],
    lambda x, _1, _2: x.transpose(0, 1).contiguous().transpose(0, 1),
    in_place,
]
ACTIVATIONS = [nn.ReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.ReLU6, nn.Tanh, nn.Identity]


class Constant(nn.Module):
    """Adds a buffer."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("values", torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.values


class RandomModel(nn.Module):
    """Of matrices or of images, which stay [N, WIDTH, ...] from step to step; each reads one earlier result, too."""

    def __init__(self, seed: int, *, images: bool) -> None:
        super().__init__()
        self.draw, self.images = random.Random(seed), images
        count = self.draw.randint(*STEPS)
        self.kinds = [self.draw.choice(OF_LAYERS if self.draw.random() < 0.5 else WITHOUT) for _ in range(count)]
        self.reads = [self.draw.randrange(step + 1) for step in range(count)]
        self.bodies = nn.ModuleList([self.body() for _ in range(count)])
        self.head = nn.Linear(WIDTH, 3)

    def body(self) -> nn.Module:
        """A layer and what may stand behind it."""
        layer = nn.Conv2d(WIDTH, WIDTH, 3, padding=1) if self.images else nn.Linear(WIDTH, WIDTH)
        norm = nn.BatchNorm2d(WIDTH) if self.images else nn.BatchNorm1d(WIDTH)
        behind = [
            norm,
            self.draw.choice(ACTIVATIONS)(),
            nn.Dropout(0.3),
            Constant((WIDTH, 1, 1)[: 3 if self.images else 1]),
        ]
        return nn.Sequential(layer, *(part for part in behind if self.draw.random() < 0.5))

    def forward(self, x: Tensor) -> Tensor:
        results = [x]
        for kind, read, body in zip(self.kinds, self.reads, self.bodies, strict=True):
            results.append(kind(results[-1], results[read], body))
        last = results[-1]
        return self.head(last.mean((2, 3)) if self.images else last)


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@torch.no_grad()
def check(seed: int, images: bool, path: Path, *, sizes: tuple[int, ...] = ()) -> None:
    torch.manual_seed(seed)
    model = RandomModel(seed, images=images)
    x = torch.randn(4, WIDTH, 5, 5) if images else torch.randn(16, WIDTH)
    for _ in range(30):
        model(torch.randn_like(x))  # statistics of its BatchNorms
    expected = model.eval()(x)
    simulated = prepare(model, x).eval()
    converted = convert(simulated)
    given, results = x.clone(), [simulated(x), converted.reference(x)]
    for _ in range(2):
        results.append(converted(x))
        assert torch.equal(x, given), "a call wrote to its input"
    converted.save(path)
    results.append(Int8Model.load(path)(x))
    trained, reference, first, second, loaded = results
    assert distance(trained, expected) < ROUNDED
    assert distance(trained, reference) < ALIKE
    assert distance(first, reference) < ALIKE
    assert torch.equal(first, second)
    assert torch.equal(first, loaded)
    for size in sizes:
        other = torch.randn(size, *x.shape[1:])
        assert distance(converted(other), converted.reference(other)) < ALIKE, size


@pytest.mark.parametrize("images", [False, True], ids=["matrices", "images"])
def test_int8_gives_what_was_trained(images: bool, tmp_path: Path) -> None:
    check(0, images, tmp_path / "model.pt2")


@pytest.mark.stress
@pytest.mark.parametrize("images", [False, True], ids=["matrices", "images"])
@pytest.mark.parametrize("seed", range(1, 13))
def test_int8_of_more_models_gives_what_was_trained(seed: int, images: bool, tmp_path: Path) -> None:
    check(seed, images, tmp_path / "model.pt2", sizes=(3, 7, 20))
