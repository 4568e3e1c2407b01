"""What the tests of `nn` share: a device that has every format, and one small module of each kind."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepseek_mp.backends import autocast
from deepseek_mp.nn import register_unit


class EveryFormat:
    """Capabilities of a device that multiplies in every format: tests must not depend on this machine's."""

    def require(self, format: str, *, emulate: bool) -> bool:
        return True


@pytest.fixture
def everything() -> EveryFormat:
    return EveryFormat()


@pytest.fixture
def bf16_region() -> Callable[[], Any]:
    return lambda: autocast(torch.device("cpu"), "bf16")


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before counts against a test's limit of recompilations, nor its own against the next's."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@register_unit
class Scaled(nn.Module):
    """A kind of unit that the package does not know: a matrix product with a scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(width, width) / width)
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, *, double: bool = False) -> Tensor:
        return (x @ self.matrix) * self.scale * (2 if double else 1)


def hugging_face_conv1d() -> type[nn.Module]:
    """A class with the name and the products of Hugging Face's Conv1D, whose package is not installed."""

    class Conv1D(nn.Module):
        def __init__(self, outputs: int, inputs: int) -> None:
            super().__init__()
            self.outputs = outputs
            self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs)
            self.bias = nn.Parameter(torch.zeros(outputs))

        def forward(self, x: Tensor) -> Tensor:
            flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
            return flat.view(*x.shape[:-1], self.outputs)

    Conv1D.__module__ = "transformers.pytorch_utils"
    Conv1D.__qualname__ = "Conv1D"
    return Conv1D


@dataclass(frozen=True)
class Kind:
    """How to make a unit of one kind and inputs for it."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]


def _kind(make: Callable[[], nn.Module], *shapes: tuple[int, ...], name: str = "") -> Kind:
    return Kind(name or type(make()).__name__, make, lambda: tuple(torch.randn(shape) for shape in shapes))


def _tokens() -> tuple[Tensor, ...]:
    return (torch.randint(0, 10, (3, 4)),)


KINDS = [
    _kind(lambda: nn.Linear(8, 6), (3, 8)),
    _kind(lambda: nn.Bilinear(4, 5, 6), (3, 4), (3, 5)),
    _kind(lambda: nn.Conv1d(4, 6, 3), (2, 4, 9)),
    _kind(lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 7)),
    _kind(lambda: nn.Conv3d(4, 6, 3), (2, 4, 5, 5, 5)),
    _kind(lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
    _kind(lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
    _kind(lambda: nn.ConvTranspose3d(4, 6, 3), (2, 4, 4, 4, 4)),
    _kind(lambda: nn.RNN(5, 6, batch_first=True), (2, 4, 5)),
    _kind(lambda: nn.LSTM(5, 6, num_layers=2), (4, 2, 5)),
    _kind(lambda: nn.GRU(5, 6, bidirectional=True), (4, 2, 5)),
    _kind(lambda: nn.RNNCell(5, 6), (2, 5), (2, 6)),
    _kind(lambda: nn.LSTMCell(5, 6), (2, 5)),
    _kind(lambda: nn.GRUCell(5, 6), (2, 5), (2, 6)),
    _kind(lambda: nn.LayerNorm(8), (3, 8)),
    _kind(lambda: nn.LayerNorm(8, elementwise_affine=False), (3, 8), name="LayerNorm without parameters"),
    _kind(lambda: nn.GroupNorm(2, 8), (3, 8, 4)),
    _kind(lambda: nn.RMSNorm(8), (3, 8)),
    _kind(lambda: nn.BatchNorm1d(8), (5, 8)),
    _kind(lambda: nn.BatchNorm2d(4), (3, 4, 5, 5)),
    _kind(lambda: nn.BatchNorm3d(4), (3, 4, 3, 3, 3)),
    _kind(lambda: nn.InstanceNorm1d(4, affine=True), (3, 4, 5)),
    _kind(lambda: nn.InstanceNorm2d(4, affine=True), (3, 4, 5, 5)),
    _kind(lambda: nn.InstanceNorm3d(4, affine=True), (3, 4, 3, 3, 3)),
    _kind(lambda: nn.PReLU(8), (3, 8)),
    Kind("Embedding", lambda: nn.Embedding(10, 8), _tokens),
    Kind("EmbeddingBag", lambda: nn.EmbeddingBag(10, 8), _tokens),
    _kind(lambda: Scaled(8), (3, 8)),
    _kind(lambda: hugging_face_conv1d()(6, 8), (2, 3, 8)),
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    torch.manual_seed(0)
    return request.param


@pytest.fixture
def scaled() -> type[Scaled]:
    return Scaled
