"""Values that are infinite or NaN, counted in pieces: by the definition of each format, and in little memory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from deepseek_mp.costs.memory import peak_during
from deepseek_mp.ops.reference import non_finite as module
from deepseek_mp.ops.reference.non_finite import non_finite

NAN, INF = math.nan, math.inf
IN_8_BITS = {
    # As the formats are defined: infinity and NaN of three mantissas, of both signs; NaN alone, of both signs; the code
    # of a negative zero; the code of 2^128.
    torch.float8_e5m2: {0x7C, 0x7D, 0x7E, 0x7F, 0xFC, 0xFD, 0xFE, 0xFF},
    torch.float8_e4m3fn: {0x7F, 0xFF},
    torch.float8_e4m3fnuz: {0x80},
    torch.float8_e5m2fnuz: {0x80},
    torch.float8_e8m0fnu: {0xFF},
}


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_infinities_and_nan_are_counted_and_nothing_else(dtype):
    largest, smallest = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    values = [1.0, NAN, -INF, 0.0, -0.0, INF, largest, -largest, smallest, smallest / 4]
    found = non_finite(torch.tensor(values, dtype=torch.float64).to(dtype))
    assert (found.dtype, found.shape) == (torch.float32, ())
    assert found == 3


@pytest.mark.parametrize("dtype", IN_8_BITS)
def test_every_code_in_8_bits(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    assert {code for code in range(256) if non_finite(codes[code])} == IN_8_BITS[dtype]


def test_a_complex_number_is_one_value():
    assert non_finite(torch.tensor([complex(NAN, INF), complex(0, NAN), 1j])) == 2


def test_what_has_no_values_has_none():
    assert non_finite(torch.empty(0, 5)) == 0
    assert non_finite(torch.tensor(INF)) == 1


@pytest.mark.parametrize("layout", ["rows", "columns", "numbers", "gaps"])
def test_large_tensors_are_counted_in_pieces(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Scores of a vocabulary may be most of a step's memory, and a copy of them would not fit beside."""
    monkeypatch.setattr(module, "PIECE", 1000)
    values = torch.randn(30_000) if layout == "numbers" else torch.randn(300, 100)
    values.view(-1)[torch.tensor([0, 12_344, 29_998])] = NAN
    values = {"columns": lambda x: x.t(), "gaps": lambda x: x[:, ::2]}.get(layout, lambda x: x)(values)
    assert non_finite(values) == 3
    peak = peak_during(lambda: non_finite(values.clone()), torch.device("cpu"), resident=())
    assert peak is not None
    assert peak < 1.5 * values.nbytes


def test_numbers_in_8_bits_take_no_copy_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 1000)
    values = torch.zeros(30_000, dtype=torch.uint8).view(torch.float8_e4m3fn)
    peak = peak_during(lambda: non_finite(values.clone()), torch.device("cpu"), resident=())
    assert peak is not None
    assert peak < 1.5 * values.nbytes


def test_a_piece_takes_three_operations_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 1000)

    def operations(values: Tensor) -> int:
        with Operations() as seen:
            non_finite(values)
        return seen.count

    small, large = operations(torch.zeros(1000)), operations(torch.zeros(20_000))
    assert small <= 4
    assert large <= small + 3 * 20
