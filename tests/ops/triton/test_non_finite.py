"""Infinities and NaN counted by Triton, against plain PyTorch: the same number.

With TRITON_INTERPRET=1 in the environment it runs on a CPU, where Triton is installed.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from deepseek_mp.ops import non_finite as front
from deepseek_mp.ops.choose import non_finite_of
from deepseek_mp.ops.non_finite import BITS

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
TILE = 4096 * 4
COUNTS = [1, 15, 4096, TILE - 1, TILE, TILE + 1, 3 * TILE, 3 * TILE + 5] + [30_000_001] * (not INTERPRETED)
NAN, INF = float("nan"), float("inf")


def spoiled(count, dtype):
    """Finite values up to 4, and infinities and NaN in about one place of seven, first and last among them."""
    x = 2 * torch.rand(count, device=DEVICE) + 2
    bad = torch.rand(count, device=DEVICE)
    x[bad < 0.1], x[bad > 0.95] = NAN, -INF
    x[0] = x[-1] = NAN
    return x.to(dtype)


def both(x):
    """What the two implementations give."""
    found = [non_finite_of(name)(x) for name in ("triton", "reference")]
    assert {(part.dtype, part.shape, part.device) for part in found} == {(torch.float32, (), x.device)}
    return tuple(part.item() for part in found)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("dtype", BITS)
def test_the_number_is_the_reference_s(count, dtype):
    ours, expected = both(spoiled(count, dtype))
    assert ours == expected > 0


@pytest.mark.parametrize("dtype", [dtype for dtype in BITS if dtype.itemsize < 4])
def test_every_code(dtype):
    codes = torch.arange(256**dtype.itemsize, device=DEVICE).to(BITS[dtype].dtype).view(dtype)
    ours, expected = both(codes)
    assert ours == expected > 0


def test_of_finite_values_and_of_none_it_is_zero():
    assert both(torch.full((TILE + 3,), 3e38, device=DEVICE)) == (0, 0)
    assert both(torch.empty(0, 4, device=DEVICE)) == (0, 0)


@pytest.mark.parametrize("count", [TILE - 2, TILE, TILE + 1])
@pytest.mark.parametrize("start", [0, 1, 2, 3])
def test_a_view_that_begins_anywhere_and_what_lies_around_it(start, count):
    x = torch.full((count + 8,), NAN, device=DEVICE)
    inner = x[start : start + count].zero_()
    assert both(inner) == (0, 0)
    inner[7] = INF
    assert both(inner) == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_orders_of_dimensions_are_read_as_they_lie(dtype):
    x = spoiled(2 * 3 * 40 * 50, dtype).view(2, 3, 40, 50)
    expected = both(x)[1]
    for view in (x.permute(3, 1, 0, 2), x.contiguous(memory_format=torch.channels_last), x.transpose(0, 3)):
        assert front.is_gapless(view)
        assert both(view) == (expected, expected)


class Sizes(TorchDispatchMode):
    """Bytes of every new tensor that an operation made; views of what was there are none."""

    def __init__(self, *known):
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.names, self.sizes = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in self.known:
            self.sizes.append(made.untyped_storage().nbytes())
        return made


def launched(monkeypatch, x):
    """What PyTorch is asked for beside the launch, which is left out: the interpreter itself uses PyTorch."""
    from deepseek_mp.ops.triton import non_finite as module  # Triton need not be installed

    launches = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append((grid, args))

    monkeypatch.setattr(module, "non_finite_kernel", Kernel())
    with Sizes(x) as seen:
        module.non_finite(x)
    return launches, seen


@pytest.mark.parametrize("shape", [(10,), (50, TILE), (7, 9, 300, 200)])
@pytest.mark.parametrize("turned", [False, True])
def test_a_tensor_takes_one_launch_and_nothing_of_its_size(monkeypatch, shape, turned):
    x = torch.zeros(shape, device=DEVICE, dtype=torch.bfloat16)
    x = x.transpose(0, -1) if turned else x
    launches, seen = launched(monkeypatch, x)
    assert len(launches) == 1
    assert launches[0][1][0].data_ptr() == x.data_ptr()
    assert len(seen.names) <= 4
    assert sum(seen.sizes) <= 16


def test_what_has_no_values_takes_no_launch(monkeypatch):
    assert not launched(monkeypatch, torch.zeros(3, 0, device=DEVICE))[0]


@pytest.mark.skipif(INTERPRETED, reason="memory of an accelerator: torch.cuda.max_memory_allocated")
def test_it_takes_no_memory_and_does_not_wait():
    x = torch.zeros(1 << 26, device=DEVICE)
    front.non_finite(x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = front.non_finite(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before <= 4096
    assert found.item() == 0


@pytest.mark.skipif(INTERPRETED, reason="more than 2^31 values: a GPU")
def test_more_values_than_32_bits_count():
    x = torch.zeros((1 << 31) + 5, device=DEVICE, dtype=torch.uint8).view(torch.float8_e4m3fn)
    x.view(torch.uint8)[-3:] = 0x7F
    x.view(torch.uint8)[(1 << 31) - 1] = 0xFF
    assert non_finite_of("triton")(x) == 4


@pytest.mark.skipif(INTERPRETED, reason="a graph of an accelerator")
def test_a_graph_is_recorded_in_pieces():
    x = spoiled(1000, torch.float32)
    front.non_finite(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = front.non_finite(x)
    expected = non_finite_of("reference")(x)
    graph.replay()
    assert found == expected
    x.zero_()
    graph.replay()
    assert found == 0


def test_it_is_counted_for_nobody_beside_a_counter_of_operations():
    x = spoiled(TILE + 5, torch.float32)
    with FlopCounterMode(display=False) as counter:
        ours = non_finite_of("triton")(x)
    assert ours == non_finite_of("reference")(x)
    assert counter.get_total_flops() == 0
