"""Max pooling by Triton, against plain PyTorch: the same bits.

With TRITON_INTERPRET=1 in the environment it runs on a CPU, where Triton is installed. The interpreter cuts numbers off
where BF16 is to be rounded to, so gradients in BF16 are whole numbers there.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch
from pool_cases import CASES, gradient, inputs, same, window

from deepseek_mp.ops.max_pool import max_pool2d, max_pool2d_backward

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def both(op, *arguments):
    """What the two implementations give."""
    return tuple(op(*arguments, implementation=name) for name in ("triton", "reference"))


def agree(x, window, g=None):
    """Forward and backward of both give the same bits in the same order of memory."""
    (values, offsets), (expected, named) = both(max_pool2d, x, *window)
    assert same(values, expected)
    assert torch.equal(offsets, named)
    if g is None:
        g = gradient(values.shape, x.dtype, whole=INTERPRETED and x.dtype is torch.bfloat16, device=x.device)
    found, wanted = both(max_pool2d_backward, g, named, x.shape[2:], *window)
    assert same(found, wanted)
    assert (values.stride(), found.stride()) == (expected.stride(), wanted.stride())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_all_windows(case, dtype):
    agree(inputs(case, dtype, device=DEVICE), window(case))


@pytest.mark.parametrize("case", ["of a ResNet", "of an SPPF"])
def test_other_orders_in_memory(case):
    shape = CASES[case][0]
    wide = inputs(case, torch.float32, device=DEVICE).repeat(1, 2, 1, 1).contiguous(memory_format=torch.channels_last)
    part = wide[:, shape[1] :]  # as a split over channels leaves it
    assert part.stride(1) == 1
    assert not part.is_contiguous(memory_format=torch.channels_last)
    outputs = max_pool2d(part, *window(case), implementation="reference")[0].shape
    g = gradient((outputs[0], 2 * outputs[1], *outputs[2:]), torch.float32, whole=True, device=DEVICE)
    agree(part, window(case), g[:, outputs[1] :])
    agree(part.contiguous(), window(case), torch.ones((), device=DEVICE).expand(outputs))


@pytest.mark.skipif(INTERPRETED, reason="takes minutes where kernels are interpreted")
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_inputs(dtype):
    x = torch.randn(32, 64, 112, 112, device=DEVICE).to(dtype, memory_format=torch.channels_last)
    agree(x, ([3, 3], [2, 2], [1, 1], False))
    x = torch.randn(32, 320, 20, 20, device=DEVICE).to(dtype, memory_format=torch.channels_last)
    agree(x, ([5, 5], [1, 1], [2, 2], False))
