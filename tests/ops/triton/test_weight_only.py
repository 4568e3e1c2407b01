"""Linear layers with weights in 8 bits by Triton, against plain PyTorch.

With TRITON_INTERPRET=1 in the environment it runs on a CPU, where Triton is installed. The interpreter cuts numbers off
where BF16 is to be rounded to, so a result in BF16 may be the next one there.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from deepseek_mp.backends.early_launch import can_launch_early
from deepseek_mp.errors import ConfigError
from deepseek_mp.ops.early_launch import unwritten
from deepseek_mp.ops.weight_only import quantised_weight, weight_only_linear

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]
DEVICE = "cpu" if INTERPRETED else "cuda"
CLOSE = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Of a result: one of its last bits."""


def agree(rows, channels, width, format, dtype, *, bias):
    weight = torch.randn(channels, width) * torch.rand(channels, 1)
    q, scale = (part.to(DEVICE) for part in quantised_weight(weight, format))
    x = torch.randn(rows, width).to(DEVICE, dtype)
    b = torch.randn(channels).to(DEVICE, dtype) if bias else None
    found = weight_only_linear(x, q, scale, b, implementation="triton")
    expected = weight_only_linear(x, q, scale, b, implementation="reference")
    assert found.dtype is dtype
    # Sums of another order differ by fp32's last bits of their largest part; sums of eight in FP16 by 4e-4 of a row's.
    off = 1e-5 * width**0.5 + (2e-3 * sizes(x, q, scale) if by_pairs(x) else 0.0)
    assert ((found.double() - expected.double()).abs() <= CLOSE[dtype] * expected.double().abs() + off).all()


def by_pairs(x):
    """Whether the kernel that multiplies pairs takes it."""
    fits = x.shape[0] == 1 and x.shape[1] % 8 == 0 and x.dtype is torch.bfloat16
    return fits and not INTERPRETED and can_launch_early(torch.device(DEVICE, 0))


def sizes(x, q, scale):
    """Of each output, if signs were random: [M, N]."""
    weight = q.double() * scale.double()[:, None]
    return (x.double() ** 2 @ (weight**2).t()).sqrt()


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 17, 64, 65, 130])
def test_all_numbers_of_rows(rows, format, dtype):
    if INTERPRETED and rows > 1 and dtype is torch.bfloat16:
        pytest.skip("the interpreter multiplies the bits of BF16 matrices as whole numbers")
    agree(rows, 40, 320, format, dtype, bias=True)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(("channels", "width"), [(1, 1), (7, 33), (129, 1040), (16, 2048), (9, 9232)])
def test_sizes_that_are_no_whole_tiles(rows, channels, width):
    agree(rows, channels, width, "int8", torch.float16, bias=False)
    agree(rows, channels, width, "fp8", torch.float16, bias=True)


def test_inputs_in_another_order_and_empty_ones():
    q, scale = (part.to(DEVICE) for part in quantised_weight(torch.randn(24, 48), "int8"))
    x = torch.randn(48, 6, device=DEVICE).half().t()
    found = weight_only_linear(x, q, scale, None, implementation="triton")
    torch.testing.assert_close(found, weight_only_linear(x, q, scale, None, implementation="reference"))
    assert weight_only_linear(x[:0], q, scale, None, implementation="triton").shape == (0, 24)


def test_inputs_in_fp32_are_for_the_reference():
    q, scale = (part.to(DEVICE) for part in quantised_weight(torch.randn(24, 48), "int8"))
    with pytest.raises(ConfigError, match=r"x in torch.float32 for the Triton kernel"):
        weight_only_linear(torch.randn(2, 48, device=DEVICE), q, scale, None, implementation="triton")


@pytest.mark.skipif(INTERPRETED, reason="takes minutes where kernels are interpreted")
@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("rows", [1, 8, 64, 512])
def test_large_layers(rows, format):
    agree(rows, 4096, 11008, format, torch.bfloat16, bias=False)


def paired(x, format, channels=40, size=1.0):
    """Outputs by the kernel that multiplies pairs, and in FP64, in units of their sizes."""
    x = x[None].to(DEVICE)
    if not by_pairs(x):
        pytest.skip("no device with the instructions of pairs (sm_90)")
    q, scale = (part.to(DEVICE) for part in quantised_weight(torch.randn(channels, x.shape[1]) * size, format))
    found = weight_only_linear(x, q, scale, None, implementation="triton").double()
    expected = x.double() @ (q.double() * scale.double()[:, None]).t()
    return found / sizes(x, q, scale), expected / sizes(x, q, scale)


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("width", [8, 24, 1024, 4096, 11008, 49152])
def test_pairs_are_near_to_fp64(width, format):
    found, expected = paired(torch.randn(width).bfloat16(), format)
    assert (found - expected).norm() < 3e-3 * expected.norm()


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("size", [1e-35, 1e-20, 1e20, 1e35])
def test_pairs_of_any_size(size, format):
    spread = torch.randn(4096) * 2.0 ** torch.randint(-30, 1, (4096,))
    found, expected = paired((spread * size).bfloat16(), format)
    assert (found - expected).norm() < 3e-3 * expected.norm()


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_pairs_of_zeros_and_of_what_is_not_finite(format):
    x = torch.zeros(4096).bfloat16()
    q, scale = (part.to(DEVICE) for part in quantised_weight(torch.randn(40, 4096), format))

    def outputs(x):
        return weight_only_linear(x[None].to(DEVICE), q, scale, None, implementation="triton")

    assert not outputs(x).any()
    x[77] = 1.0
    torch.testing.assert_close(outputs(x)[0], (q.float()[:, 77] * scale).bfloat16())
    for value in (float("inf"), float("-inf"), float("nan")):
        x[78] = value
        assert not outputs(x).isfinite().any()


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_pairs_of_numbers_that_are_not_normal(format):
    found, expected = paired((torch.randn(4096) * 1e-39).bfloat16(), format, size=2.0**30)
    assert (found - expected).norm() < 3e-3 * expected.norm()


@pytest.fixture
def launched(monkeypatch):
    """What the kernel that multiplies pairs is given, on a device that seems to have it, where it is not run."""
    weight_only = pytest.importorskip("deepseek_mp.ops.triton.weight_only")
    found = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *given, **options: found.append((given, options))

    monkeypatch.setattr(weight_only, "can_launch_early", lambda device: True)
    monkeypatch.setattr(weight_only, "paired_vector_kernel", Kernel())
    return found


@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_parts_of_rows_of_any_width_are_multiplied_by_pairs(launched, format):
    q, scale = (part.to(DEVICE) for part in quantised_weight(torch.randn(1, 48), format))
    wide = torch.zeros(1, 75, dtype=q.dtype, device=DEVICE)
    wide[:, 8:56] = q
    x = torch.randn(1, 75, device=DEVICE).bfloat16()
    weight_only_linear(x[:, 4:52], wide[:, 8:56], scale, None, implementation="triton")
    ((values, weights, *_), _) = launched.pop()
    assert torch.equal(values.view(torch.bfloat16), x[0, 4:52])
    assert torch.equal(weights.view(torch.int8), q[0].view(torch.int8))
    weight_only_linear(x[:, 3:51], q, scale, None, implementation="triton")
    weight_only_linear(x[:, 4:52], wide[:, 7:55], scale, None, implementation="triton")
    assert not launched, "none of these begins with a word"


def test_fp8_of_the_other_kind_is_for_the_reference():
    q = torch.zeros(24, 48, device=DEVICE).to(torch.float8_e4m3fnuz)
    with pytest.raises(ConfigError, match=r"weights in torch.float8_e4m3fnuz for the Triton kernel"):
        weight_only_linear(
            torch.zeros(1, 48, device=DEVICE).bfloat16(), q, torch.ones(24, device=DEVICE), None,
            implementation="triton",
        )  # fmt: skip


def test_weights_are_read_ahead_only_where_no_call_writes_to_them(launched):
    q, scale = (part.to(DEVICE) for part in quantised_weight(torch.randn(24, 48), "int8"))
    x = torch.randn(1, 48, device=DEVICE).bfloat16()
    with unwritten([q]):
        for weight in (q, q[8:], q.clone()):
            weight_only_linear(x, weight, scale[: len(weight)], None, implementation="triton")
    weight_only_linear(x, q, scale, None, implementation="triton")
    assert [options["AHEAD"] for _, options in launched] == [True, True, False, False]
