"""Max pooling by our ops: values and gradients are those of PyTorch's pool, bit for bit."""

from __future__ import annotations

import pytest
import torch
from pool_cases import CASES, gradient, inputs, same, window
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from deepseek_mp.errors import ConfigError, ShapeError
from deepseek_mp.ops.choose import max_pool_of
from deepseek_mp.ops.max_pool import fastest, max_pool2d, max_pool2d_backward
from deepseek_mp.ops.pool_window import PoolWindow

FORMATS = [torch.channels_last, torch.contiguous_format]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_pytorch_s(case, dtype, memory_format):
    x = inputs(case, dtype, memory_format=memory_format).requires_grad_()
    expected = F.max_pool2d(x, *CASES[case][1:4], ceil_mode=CASES[case][4])
    values, offsets = max_pool2d(x, *window(case), implementation="reference")
    assert same(values, expected)
    assert values.is_contiguous(memory_format=torch.channels_last)
    assert (offsets.dtype, offsets.stride()) == (torch.uint8, values.stride())
    g = gradient(expected.shape, dtype)
    (found,) = torch.autograd.grad(values, x, g)
    # PyTorch rounds each of the sums where they are 16 bits wide; summed in fp32, they are rounded once.
    wide = x.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    pooled = F.max_pool2d(wide, *CASES[case][1:4], ceil_mode=CASES[case][4])
    assert same(found, torch.autograd.grad(pooled, wide, g.to(wide.dtype))[0].to(dtype))
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", CASES)
def test_the_compiler_is_told_the_truth_about_shapes_and_strides(case):
    x = inputs(case, torch.float32).nan_to_num(0.0, 9.0, -9.0)
    torch.library.opcheck(torch.ops.deepseek_mp.max_pool2d, (x.clone().requires_grad_(), *window(case), "reference"))
    values, offsets = max_pool2d(x, *window(case), implementation="reference")
    torch.library.opcheck(
        torch.ops.deepseek_mp.max_pool2d_backward,
        (gradient(values.shape, x.dtype, whole=True), offsets, x.shape[2:], *window(case), "reference"),
    )


@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_any_order_are_pytorch_s(case):
    shape, *how, ceil_mode = CASES[case]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, generator=generator).to(memory_format=torch.channels_last)

    def derivatives(pool):
        inputs = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(pool(inputs).pow(3).sum(), inputs, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(3).sum(), inputs, create_graph=True)
        return first, second, *torch.autograd.grad(second.square().sum(), inputs)

    found = derivatives(lambda x: max_pool2d(x, *window(case), implementation="reference")[0])
    expected = derivatives(lambda x: F.max_pool2d(x, *how, ceil_mode=ceil_mode))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_pool_is_not_free_to_compute_again():
    with FlopCounterMode(display=False) as mode:
        max_pool2d(torch.randn(2, 8, 9, 9), *window("of a ResNet"), implementation="reference")
    assert mode.get_total_flops() == 2 * 8 * 5 * 5 * 9


def test_a_device_without_kernels_keeps_pytorch_s_own():
    assert fastest(torch.device("cpu"), torch.float32) is None
    assert fastest(torch.device("cuda"), torch.float64) is None


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (((3, 3, 3), (1, 1), (0, 0)), "pairs"),
        (((3, 3), (0, 1), (0, 0)), "stride from 1"),
        (((3, 3), (1, 1), (2, 0)), "half of the kernel"),
        (((16, 16), (1, 1), (0, 0)), "255 cells"),
    ],
)
def test_windows_that_are_none(how, message):
    with pytest.raises(ConfigError, match=message):
        PoolWindow.of(*how, False)


def test_inputs_that_cannot_be_pooled():
    window = (2, 2), (2, 2), (0, 0), False
    with pytest.raises(ShapeError, match="N, C, H, W"):
        max_pool2d(torch.randn(8, 4, 4), *window, implementation="reference")
    with pytest.raises(ShapeError, match="at least one whole window"):
        max_pool2d(torch.randn(1, 8, 1, 4), *window, implementation="reference")
    with pytest.raises(ConfigError, match="floating"):
        max_pool2d(torch.ones(1, 8, 4, 4, dtype=torch.int64), *window, implementation="reference")
    with pytest.raises(ConfigError, match="implementation 'native' of max_pool"):
        max_pool_of("max_pool2d", "native")


def test_a_gradient_of_another_size():
    g = torch.randn(1, 8, 2, 2)
    for offsets, size in ((g[:, :, :1], (4, 4)), (g, (9, 4))):
        with pytest.raises(ShapeError, match="size of its input"):
            max_pool2d_backward(
                g, offsets.to(torch.uint8), size, (2, 2), (2, 2), (0, 0), False, implementation="reference"
            )
